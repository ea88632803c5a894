# SPDX-License-Identifier: Apache-2.0
"""Descriptors that are damaged, forged, expired, revoked or stale: refused, each by its name."""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import struct
import zlib
from typing import TYPE_CHECKING

import pytest

import transferd
from transferd.native.names import JobStatus
from transferd.v1 import admin_pb2, admin_pb2_grpc

from support.bystander import Bystander
from support.waiting import WAIT_S, eventually

if TYPE_CHECKING:
    from collections.abc import Iterator

    from conftest import MakeDaemon

    from support.daemon import DaemonProcess

    Pair = tuple[DaemonProcess, DaemonProcess]

pytestmark = pytest.mark.slow

IMM = 1
LENGTH = 4096
CRC_AND_MAC = 4 + 32
GRANT_ID_AT, DAEMON_ID_AT, EPOCH_AT, ADDRESS_AT = 6, 14, 30, 46  # in daemon/descriptor.py


@pytest.fixture(params=["ring", "grpc"])
def sender(request: pytest.FixtureRequest, shared_pair: Pair) -> Iterator[transferd.Client]:
    with transferd.Client(shared_pair[0].socket, shared_memory=request.param == "ring") as client:
        yield client


@pytest.fixture
def receiver(shared_pair: Pair) -> Iterator[transferd.Client]:
    with transferd.Client(shared_pair[1].socket) as client:
        yield client


@pytest.fixture
def grant(receiver: transferd.Client) -> Iterator[transferd.Grant]:
    region = receiver.alloc(LENGTH)
    yield region.grant(imms=[IMM])
    # Whatever was tried: nothing landed, nothing was counted but what the test itself counted.
    assert not any(region.view)


def refused(sender: transferd.Client, descriptor: bytes) -> transferd.TransferdError:
    """Uses a descriptor that has to be refused."""
    with pytest.raises(transferd.TransferdError) as caught:
        sender.imm(descriptor, IMM).wait(WAIT_S)
    return caught.value


def with_crc(descriptor: bytes) -> bytes:
    """Mends the checksum of a changed descriptor, so that only its owner can tell."""
    body, mac = descriptor[:-CRC_AND_MAC], descriptor[-32:]
    return body + struct.pack(">I", zlib.crc32(body)) + mac


def test_truncated_at_every_length(sender: transferd.Client, grant: transferd.Grant) -> None:
    for length in range(len(grant.descriptor)):
        error = refused(sender, grant.descriptor[:length])
        assert isinstance(error, transferd.InvalidRequest), length
        assert error.reason == "DESCRIPTOR_INVALID"
    for longer in (grant.descriptor + b"\0", grant.descriptor * 2, grant.descriptor + bytes(4096)):
        assert refused(sender, longer).reason == "DESCRIPTOR_INVALID"


def test_a_bit_flipped_in_every_byte(sender: transferd.Client, grant: transferd.Grant) -> None:
    good = grant.descriptor
    for at in range(len(good)):
        bad = bytearray(good)
        bad[at] ^= 1 << at % 8
        error = refused(sender, bytes(bad))
        if at < len(good) - 32:
            assert error.reason == "DESCRIPTOR_INVALID", at
        else:  # the MAC: only the owner can tell
            assert error.reason == "DESCRIPTOR_FORGED", at
            assert isinstance(error, transferd.AccessDenied)
    assert sender.imm(good, IMM).wait(WAIT_S) is JobStatus.OK


def test_foreign_magic_and_version(sender: transferd.Client, grant: transferd.Grant) -> None:
    good = grant.descriptor
    for bad in (b"tfd2" + good[4:], b"\0" * len(good), with_crc(b"tfd1\x02" + good[5:])):
        error = refused(sender, bad)
        assert (error.reason, type(error)) == ("DESCRIPTOR_INVALID", transferd.InvalidRequest)
        assert "pass the owner's bytes on unchanged" in str(error)


@pytest.mark.parametrize("at", [GRANT_ID_AT + 7, GRANT_ID_AT])
def test_forged_grant_number(sender: transferd.Client, grant: transferd.Grant, at: int) -> None:
    """Another grant's number, the checksum mended: the MAC does not fit."""
    bad = bytearray(grant.descriptor)
    bad[at] ^= 1
    error = refused(sender, with_crc(bytes(bad)))
    assert (error.reason, type(error)) == ("DESCRIPTOR_FORGED", transferd.AccessDenied)


def test_forged_while_the_true_one_is_open(
    sender: transferd.Client, grant: transferd.Grant
) -> None:
    assert sender.imm(grant.descriptor, IMM).wait(WAIT_S) is JobStatus.OK
    guess = hmac.new(b"guess", grant.descriptor[:-32], hashlib.sha256).digest()
    for bad in (grant.descriptor[:-32] + guess, grant.descriptor[:-32] + bytes(32)):
        assert refused(sender, bad).reason == "DESCRIPTOR_FORGED"
    assert sender.imm(grant.descriptor, IMM).wait(WAIT_S) is JobStatus.OK


@pytest.mark.parametrize("at", [DAEMON_ID_AT, EPOCH_AT])
def test_of_another_daemon_or_life(
    sender: transferd.Client, grant: transferd.Grant, at: int
) -> None:
    bad = bytearray(grant.descriptor)
    bad[at] ^= 0x80
    error = refused(sender, with_crc(bytes(bad)))
    assert isinstance(error, transferd.StaleDescriptor)
    assert "new one" in str(error)


def test_forgeries_do_not_touch_what_the_daemons_have(shared_pair: Pair) -> None:
    """Whoever holds a descriptor can change it and mend its checksum; nobody else may notice."""
    near, far = shared_pair

    def losses() -> int:
        with near.channel() as channel:
            admin = admin_pb2_grpc.AdminServiceStub(channel)
            peers = admin.ListPeers(admin_pb2.ListPeersRequest(), timeout=WAIT_S).peers
        return sum(peer.losses for peer in peers if peer.address == far.peer_address)

    with (
        Bystander(near, far) as bystander,
        transferd.Client(near.socket) as sender,
        transferd.Client(far.socket) as receiver,
    ):
        good = receiver.alloc(LENGTH).grant(imms=[IMM]).descriptor
        bystander.check()
        before = losses()
        for at in range(GRANT_ID_AT, ADDRESS_AT):
            bad = bytearray(good)
            bad[at] ^= 1
            refused(sender, with_crc(bytes(bad)))
        bystander.check()
        assert losses() == before
        assert sender.imm(good, IMM).wait(WAIT_S) is JobStatus.OK


def test_address_where_nobody_is(sender: transferd.Client, grant: transferd.Grant) -> None:
    good = grant.descriptor
    body = good[:ADDRESS_AT]
    for address, kind in (
        (b"127.0.0.1:1", transferd.PeerLost),
        (b"192.0.2.1:7471", transferd.AccessDenied),  # development mode: loopback only
        (b"127.0.0.1:0", transferd.InvalidRequest),
        (b"127.0.0.1", transferd.InvalidRequest),
        (b"a b:\xff\xfe", transferd.InvalidRequest),
    ):
        bad = bytearray(body + address)
        bad[5] = len(address)
        bad[DAEMON_ID_AT] ^= 1  # of nobody that is known
        error = refused(sender, with_crc(bytes(bad) + good[-CRC_AND_MAC:]))
        assert isinstance(error, kind), (address, error)


def test_revoked(
    sender: transferd.Client, receiver: transferd.Client, grant: transferd.Grant
) -> None:
    second = receiver.alloc(LENGTH).grant(imms=[IMM])
    assert sender.imm(second.descriptor, IMM).wait(WAIT_S) is JobStatus.OK
    for revoked in (grant, second):  # before its first use, and after
        revoked.revoke()
        for _ in range(2):  # by the job, then by the opening
            assert "REVOKED" in refused(sender, revoked.descriptor).reason


def test_of_a_region_that_is_gone(sender: transferd.Client, receiver: transferd.Client) -> None:
    region = receiver.alloc(LENGTH)
    descriptor = region.grant(imms=[IMM]).descriptor
    region.close()
    assert "REVOKED" in refused(sender, descriptor).reason


def test_of_a_session_that_is_gone(sender: transferd.Client, shared_pair: Pair) -> None:
    with transferd.Client(shared_pair[1].socket) as short:
        descriptor = short.alloc(LENGTH).grant(imms=[IMM]).descriptor
        assert sender.imm(descriptor, IMM).wait(WAIT_S) is JobStatus.OK
    for _ in range(2):
        assert "REVOKED" in refused(sender, descriptor).reason


def test_expired(sender: transferd.Client, receiver: transferd.Client) -> None:
    region = receiver.alloc(LENGTH)
    never_used = region.grant(imms=[IMM], expires_s=0.05)
    used = region.grant(imms=[IMM], expires_s=0.3)
    assert sender.imm(used.descriptor, IMM).wait(WAIT_S) is JobStatus.OK

    def over() -> bool:
        with contextlib.suppress(transferd.TransferdError):
            sender.imm(used.descriptor, IMM).wait(WAIT_S)
            return False
        return True

    eventually(over, "the grant expires", 3.0)
    for descriptor in (never_used.descriptor, used.descriptor):
        assert "EXPIRED" in refused(sender, descriptor).reason


def test_one_bad_in_a_batch(sender: transferd.Client, grant: transferd.Grant) -> None:
    bad = grant.descriptor[:-1] + bytes([grant.descriptor[-1] ^ 1])
    with pytest.raises(transferd.AccessDenied):
        sender.submit(
            [transferd.Imm(dst=grant.descriptor, imm=IMM), transferd.Imm(dst=bad, imm=IMM)]
        )
    with pytest.raises(transferd.AccessDenied):
        sender.warm(grant.descriptor, bad)
    assert sender.imm(grant.descriptor, IMM).wait(WAIT_S) is JobStatus.OK


def test_of_an_earlier_life_of_the_own_daemon(make_daemon: MakeDaemon) -> None:
    """Sender and owner are one daemon, which has restarted; its state directory keeps who it is."""
    daemon = make_daemon()
    daemon.stop()
    daemon.config["state_dir"] = str(daemon.directory / "state")
    daemon.start()
    with transferd.Client(daemon.socket) as client:
        old = client.alloc(LENGTH).grant(imms=[IMM]).descriptor
    daemon.restart()
    with transferd.Client(daemon.socket) as client:
        error = refused(client, old)
        assert isinstance(error, transferd.StaleDescriptor)
        fresh = client.alloc(LENGTH).grant(imms=[IMM])
        assert client.imm(fresh.descriptor, IMM).wait(WAIT_S) is JobStatus.OK
