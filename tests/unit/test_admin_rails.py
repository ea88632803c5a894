# SPDX-License-Identifier: Apache-2.0
"""What operators are told about rails: what the provider chose; that it is not the right one."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import pytest
from click.testing import CliRunner

from transferd.client.ctl import main as ctl
from transferd.client.rpc import Control
from transferd.daemon.config import VerbsConfig
from transferd.daemon.metrics import Snapshot
from transferd.daemon.services.admin import AdminService, Facts
from transferd.daemon.topology import Choice, Verdict
from transferd.daemon.topology.nic import Nic
from transferd.v1 import admin_pb2 as pb

from support.fake_plane import rail
from support.hosts import Host, Network

if TYPE_CHECKING:
    from collections.abc import Callable

WHY = "port 1, GID 3 (RoCE v2, 10.0.0.7), MTU 4096"
FALLBACK = "This host has RDMA devices, but provider auto falls back to kernel sockets (tcp)"


@pytest.fixture
def host() -> Host:
    return Host(Network(), 7001, rails=[rail("mlx5_0", why=WHY), rail("mlx5_1"), rail("local")])


def facts(fallback: str = "") -> Facts:
    rails = tuple(Verdict(Nic(name, "ACTIVE", 0), "chosen") for name in ("mlx5_0", "mlx5_1"))
    choice = Choice(rails, (), (), "from devices", "tcp" if fallback else "verbs", fallback)
    verbs = None if fallback else VerbsConfig(service_level=3, bulk_service_level=1)
    return cast("Facts", SimpleNamespace(provider="p", tls=False, rails=choice, verbs=verbs))


async def listed(host: Host, fallback: str = "") -> pb.ListRailsResponse:
    admin = AdminService(
        facts(fallback),
        host.plane,
        host.sessions,
        host.owner,
        host.opener,
        host.peers,
        host.staging,
    )
    return await admin.ListRails(pb.ListRailsRequest(), cast("Any", None))


async def test_the_provider_says_what_it_chose(host: Host) -> None:
    answer = await listed(host)
    assert [one.provider_why for one in answer.rails] == [WHY, "", ""]
    assert answer.fallback == ""
    levels = [(one.service_level, one.bulk_service_level) for one in answer.rails]
    assert levels == [(3, 1), (3, 1), (0, 0)], "copies have none"


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Callable[[pb.ListRailsResponse, list[str]], str]:
    """Runs transferctl with an answer of the daemon's."""

    def run(answer: pb.ListRailsResponse, arguments: list[str]) -> str:
        monkeypatch.setattr(Control, "call", lambda self, method, request: answer)
        result = CliRunner().invoke(ctl.cli, [*arguments, "--socket", "/nowhere"])
        assert result.exit_code == 0, result.output
        return result.output

    return run


async def test_transferctl_shows_it(host: Host, run: Any) -> None:
    answer = await listed(host, FALLBACK)
    shown = run(answer, ["rails", "--why"])
    assert f"chosen; {WHY}" in shown
    assert f"warning: {FALLBACK}" in shown
    assert f'"provider_why": "{WHY}"' in run(answer, ["rails", "--why", "--json"])
    shown = run(await listed(host), ["rails", "--why"])
    assert "warning" not in shown
    assert f"{WHY}; service level 3, bulk 1; traffic class 0" in shown


@pytest.mark.parametrize(("fallback", "value"), [("", 0), (FALLBACK, 1)])
async def test_a_fallback_is_a_metric(host: Host, fallback: str, value: int) -> None:
    told = facts(fallback)
    snapshot = Snapshot(
        "1",
        told,
        host.plane,
        host.sessions,
        host.owner,
        host.opener,
        host.peers,
        host.lanes,
        host.staging,
    )
    (metric,) = (one for one in snapshot.take() if one.name == "transferd_fallback")
    assert [(one.labels, one.value) for one in metric.samples] == [
        ({"provider": told.rails.provider}, value)
    ]
