# SPDX-License-Identifier: Apache-2.0
"""Daemons that authenticate each other, and those that cannot."""

from __future__ import annotations

from typing import TYPE_CHECKING

import grpc
import pytest

import transferd
from transferd.client import JobStatus
from transferd.daemon import certs
from transferd.peer.v1 import peer_pb2, peer_pb2_grpc

if TYPE_CHECKING:
    from pathlib import Path

    from conftest import MakeDaemon

pytestmark = pytest.mark.slow


def keys(directory: Path, name: str, *hosts: str) -> dict[str, str]:
    """Makes a certificate; returns the tls section that uses it."""
    cert, key, ca = certs.make(directory, name, hosts or ("127.0.0.1",))
    return {"cert": str(cert), "key": str(key), "ca": str(ca)}


def test_two_hosts_of_one_ca(make_daemon: MakeDaemon, tmp_path: Path) -> None:
    near = make_daemon(tls=keys(tmp_path, "near"))
    far = make_daemon(tls=keys(tmp_path, "far"))
    assert near.status().tls
    assert not near.status().warnings
    with transferd.Client(near.socket) as sender, transferd.Client(far.socket) as receiver:
        grant = receiver.alloc(4096).grant(imms=[1])
        job = sender.write(sender.alloc(4096), grant.descriptor, imm=1)
        assert job.wait(10) is JobStatus.OK
        receiver.counter(1).wait(1, 10)
        grant.revoke()  # the call the other way round


@pytest.mark.parametrize("wrong", ["ca", "host", "none"])
def test_strangers_are_not_spoken_to(make_daemon: MakeDaemon, tmp_path: Path, wrong: str) -> None:
    far = make_daemon(tls=keys(tmp_path / "one", "far"))
    if wrong == "ca":
        near = make_daemon(tls=keys(tmp_path / "two", "near"))
    elif wrong == "none":
        near = make_daemon()
    else:
        near = make_daemon(tls=keys(tmp_path / "one", "near"))
        far = make_daemon(tls=keys(tmp_path / "one", "elsewhere", "192.0.2.7"))
    with transferd.Client(near.socket) as sender, transferd.Client(far.socket) as receiver:
        grant = receiver.alloc(4096).grant(imms=[1])
        source = sender.alloc(4096)
        with pytest.raises(transferd.PeerLost) as caught:
            sender.write(source, grant.descriptor, imm=1).wait(10)
        assert caught.value.reason == "PEER_UNREACHABLE"
        assert receiver.counter(1).value == 0


def test_peer_port_needs_a_certificate(make_daemon: MakeDaemon, tmp_path: Path) -> None:
    section = keys(tmp_path, "far")
    far = make_daemon(tls=section)
    with open(section["ca"], "rb") as file:
        only_ca = grpc.ssl_channel_credentials(file.read())
    for channel in (
        grpc.insecure_channel(far.peer_address),
        grpc.secure_channel(far.peer_address, only_ca),
    ):
        with channel:
            stub = peer_pb2_grpc.PeerServiceStub(channel)
            with pytest.raises(grpc.RpcError) as caught:
                stub.Hello(peer_pb2.HelloRequest(daemon_id=b"d" * 16), timeout=5)
            assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
