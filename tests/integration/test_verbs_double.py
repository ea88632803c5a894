# SPDX-License-Identifier: Apache-2.0
"""Daemons with provider verbs, on the double of libibverbs: any host can run it.

Real devices are in the guests of tests/vm.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest
import yaml
from click.testing import CliRunner

import transferd
from transferd.client.ctl import main as ctl
from transferd.v1 import admin_pb2, admin_pb2_grpc

from support.providers import SOFTVERBS
from support.tree import ROOT
from support.twins import Twins
from support.waiting import WAIT_S

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from conftest import MakeDaemon

    from support.daemon import DaemonProcess

pytestmark = pytest.mark.slow

MIB = 1 << 20
VERBS: dict[str, Any] = {
    "provider": "verbs",
    "rails": ["soft0", "soft1"],
    "verbs": {"library": SOFTVERBS},
}
LIMITED = 4 * MIB  # raising a limit takes a capability, so less than any host's
ADDRESSES = "GID index 3: 10.1.0.1 (RoCE v2)"


@pytest.fixture(scope="module", autouse=True)
def library() -> None:
    """Builds the double."""
    subprocess.run(["make", "-s", "-C", str(ROOT / "native"), "softverbs"], check=True)


@pytest.fixture
def twins(request: pytest.FixtureRequest, short_tmp: Path) -> Iterator[Twins]:
    """Two daemons of two rails each, joined by the double's network."""
    pair = Twins(short_tmp, VERBS)
    request.node.transferd_daemons = [pair, pair.second]
    with pair:
        yield pair


@pytest.fixture
def start(make_daemon: MakeDaemon, monkeypatch: pytest.MonkeyPatch) -> Callable[..., DaemonProcess]:
    """Starts a daemon on a double that is as told."""

    def start(soft: str = "", **verbs: Any) -> DaemonProcess:
        monkeypatch.setenv("SOFTVERBS", soft)
        return make_daemon(**{**VERBS, "verbs": {"library": SOFTVERBS, **verbs}})

    return start


def rails_told(daemon: DaemonProcess) -> admin_pb2.ListRailsResponse:
    with daemon.channel() as channel:
        stub: Any = admin_pb2_grpc.AdminServiceStub(channel)
        reply: admin_pb2.ListRailsResponse = stub.ListRails(admin_pb2.ListRailsRequest(), timeout=5)
    return reply


# ---- it works ----


def test_a_pair_moves_bytes_by_verbs(twins: Twins) -> None:
    data = os.urandom(4 * MIB)
    with (
        transferd.Client(twins.socket) as sender,
        transferd.Client(twins.second.socket) as receiver,
    ):
        source, target = sender.alloc(len(data)), receiver.alloc(len(data))
        source.view[:] = data
        grant = target.grant(rights={"write", "read"}, imms=range(3))
        job = sender.write(src=source, dst=grant.descriptor, imm=1)
        assert job.wait(WAIT_S).name == "OK"
        assert job.path is not None
        assert (job.path.provider, job.path.rails) == ("verbs", 2)
        receiver.counter(1).wait(1, timeout_s=WAIT_S)
        assert hashlib.sha256(target.view).digest() == hashlib.sha256(data).digest()
        pages = list(range(0, 256, 3))
        job = sender.write_pages(
            src=source, src_pages=pages, dst=grant.descriptor, dst_pages=pages[::-1],
            page_bytes=4096, imm=2,
        )  # fmt: skip
        assert job.wait(WAIT_S).name == "OK"
        receiver.counter(2).wait(len(pages), timeout_s=WAIT_S)
        for there, here in zip(pages, pages[::-1], strict=True):
            assert bytes(target.view[here * 4096 :][:4096]) == data[there * 4096 :][:4096]
        back = sender.alloc(MIB)
        assert sender.read(src=grant.descriptor, dst=back).wait(WAIT_S).name == "OK"
        assert back.view[:] == target.view[:MIB]
        mailbox = receiver.mailbox(slots=8, slot_bytes=256)
        for number in range(20):
            sender.send(mailbox.descriptor, b"message %d" % number).wait(WAIT_S)
            assert bytes(mailbox.receive(WAIT_S)) == b"message %d" % number
    sent = [rail.bytes_sent for rail in twins.rails()]
    assert min(sent[:2]) > MIB, "both rails carry"
    assert twins.status().provider == "verbs roce2 1"


def test_operators_are_told_what_was_chosen(
    start: Callable[..., DaemonProcess], monkeypatch: pytest.MonkeyPatch
) -> None:
    daemon = start(service_level=2, bulk_service_level=1, traffic_class=106, mtu=1024)
    told = rails_told(daemon)
    soft = [rail for rail in told.rails if rail.name != "local"]
    assert [rail.provider for rail in soft] == ["verbs soft0:1", "verbs soft1:1"]
    assert ADDRESSES in soft[0].provider_why
    assert "MTU 1024" in soft[0].provider_why
    assert [(r.service_level, r.bulk_service_level, r.traffic_class) for r in soft] == [
        (2, 1, 106)
    ] * 2
    shown = CliRunner().invoke(ctl.cli, ["rails", "--why", "--socket", daemon.socket])
    assert ADDRESSES in shown.output
    assert "service level 2, bulk 1; traffic class 106" in shown.output
    plain = CliRunner().invoke(ctl.cli, ["rails", "--why", "--json", "--socket", daemon.socket])
    assert json.loads(plain.output)["rails"][0]["traffic_class"] == 106


@pytest.mark.parametrize(
    ("soft", "verbs", "said"),
    [
        ("", {"gid_index": 1}, "as configured"),
        ("gids=v2:ll", {"link_local": True}, "link-local as allowed"),
        ("link=ib gids=ib:ll", {}, "the port's own"),
        ("ports=2", {"port": 2}, "port 2"),
    ],
)
def test_the_configuration_is_followed(
    start: Callable[..., DaemonProcess], soft: str, verbs: dict[str, Any], said: str
) -> None:
    assert said in rails_told(start(soft, **verbs)).rails[0].provider_why


# ---- it does not ----


@pytest.mark.parametrize(
    ("soft", "overrides", "said"),
    [
        ("", {"verbs": {"library": "/nowhere/libibverbs.so.1"}}, "/nowhere/libibverbs.so.1"),
        ("", {"verbs": {"library": "libc.so.6"}}, "not the libibverbs"),
        ("", {"rails": ["mlx5_0"]}, "the devices are soft0, soft1"),
        ("gids=v2:ll", {}, "no RoCE v2 GID that can be routed"),
        ("gids=v1:v4", {}, "no RoCE v2 GID that can be routed"),
        ("gids=-", {}, "no RoCE v2 GID that can be routed"),
        ("", {"verbs": {"library": SOFTVERBS, "gid_index": 9}}, "no GID with index 9"),
        ("", {"verbs": {"library": SOFTVERBS, "port": 7}}, "soft0"),
        ("", {"verbs": {"library": SOFTVERBS, "pkey": 0x1234}}, "no pkey 0x1234"),
    ],
)
def test_a_start_that_fails_says_why(
    short_tmp: Path, soft: str, overrides: dict[str, Any], said: str
) -> None:
    config = {
        "listen": f"unix://{short_tmp}/transferd.sock",
        "peer_listen": "127.0.0.1:7999",
        **VERBS,
        **overrides,
    }
    path = short_tmp / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    result = subprocess.run(
        [sys.executable, "-m", "transferd", "serve", "--config", str(path)],
        capture_output=True,
        text=True,
        timeout=WAIT_S,
        env={**os.environ, "PYTHONSAFEPATH": "1", "SOFTVERBS": soft},
        check=False,
    )
    assert result.returncode == 1, result
    (told,) = (line for line in result.stderr.splitlines() if line.startswith("transferd: "))
    assert said in told
    assert "fabric.library" not in told, "that is another provider's"


def test_hosts_of_other_providers_are_refused_by_name(
    make_daemon: MakeDaemon, start: Callable[..., DaemonProcess]
) -> None:
    verbs, tcp = start(), make_daemon()
    for near, far in ((verbs, tcp), (tcp, verbs)):
        with transferd.Client(near.socket) as sender, transferd.Client(far.socket) as receiver:
            grant = receiver.alloc(4096).grant(imms=[1])
            with pytest.raises(transferd.TransferdError) as caught:
                sender.imm(grant.descriptor, 1).wait(WAIT_S)
        assert caught.value.reason == "PROTOCOL_MISMATCH"
        for name in ("verbs/roce2/1", "tcp/1", near.peer_address, far.peer_address):
            assert name in str(caught.value)
    assert "peer refused" in verbs.log()
    assert "peer refused" in tcp.log()


# ---- pinned memory ----


@pytest.fixture
def limited(request: pytest.FixtureRequest, short_tmp: Path) -> Iterator[Twins]:
    """Daemons that may pin 4 MiB, and lack the capability to pin more."""
    pair = Twins(short_tmp, VERBS)
    request.node.transferd_daemons = [pair, pair.second]
    if os.getuid() == 0:
        pair.prefix = ["setpriv", "--bounding-set=-ipc_lock"]
    pair.prefix += ["prlimit", f"--memlock={LIMITED}:{LIMITED}"]
    pair.environment["SOFTVERBS"] = f"memlock={LIMITED}"
    with pair:
        yield pair


def test_a_limit_of_pinned_memory_is_told_before_and_after(limited: Twins) -> None:
    (warning,) = (one for one in limited.status().warnings if "RLIMIT_MEMLOCK" in one)
    assert "This process may pin 4 MiB" in warning
    assert "on each of 2 rails" in warning
    assert warning in limited.log()
    health = CliRunner().invoke(ctl.cli, ["health", "--socket", limited.socket])
    assert health.exit_code == 0
    assert f"warning: {warning}" in health.output
    with transferd.Client(limited.socket) as client:
        with pytest.raises(transferd.QuotaExceeded) as caught:
            client.alloc(4 * LIMITED)
        assert caught.value.reason == "MEMLOCK"
        for part in ("16777216 bytes", "4 MiB", "LimitMEMLOCK=infinity", "ulimit -l unlimited"):
            assert part in str(caught.value)
        client.alloc(MIB)  # what fits goes on
