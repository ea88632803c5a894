# SPDX-License-Identifier: Apache-2.0
"""Opening the rails: what falls back and what does not, what verbs is told, limits of memory."""

from __future__ import annotations

import errno
import resource
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from transferd.daemon import config, errors, memlock, rails
from transferd.daemon.dataplane import fill_verbs
from transferd.daemon.plane import GroupOptions, PlaneError, RailState, VerbsOptions
from transferd.daemon.sockets import StartError
from transferd.daemon.topology import Choice, NoRailError, Verdict
from transferd.daemon.topology.nic import Nic
from transferd.native.daemon_half import ffi

from support.fake_plane import FakePlane, rail
from support.hosts import Host, Network

if TYPE_CHECKING:
    from collections.abc import Callable

    from transferd.daemon.config import Config

MISSING = "libibverbs.so.1 cannot be opened; install libibverbs1"
GIB = 1 << 30


class Plane(FakePlane):
    """Has no verbs; notes what it was asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[GroupOptions] = []

    async def open_group(self, options: GroupOptions) -> int:
        self.asked.append(options)
        if options.provider == "verbs":
            raise PlaneError(errno.ENOENT, MISSING)
        return 7


@pytest.fixture
def adapters(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A host with two adapters; tells why verbs was given up, at each choice."""
    told: list[str] = []

    def choose(parsed: Config, peer_address: str, verbs_failed: str) -> Choice:
        told.append(verbs_failed)
        names = ("eth0",) if verbs_failed else parsed.rails or ("mlx5_0", "mlx5_1")
        found = tuple(Verdict(Nic(name, "ACTIVE", 0), "") for name in names)
        fallback = f"falls back: {verbs_failed}" if verbs_failed else ""
        return Choice(found, (), (), "", "tcp" if verbs_failed else "verbs", fallback)

    monkeypatch.setattr(rails, "rails_of_this_host", choose)
    return told


async def test_auto_falls_back_and_says_so(adapters: list[str]) -> None:
    plane, parsed = Plane(), config.parse("")
    group, choice = await rails.open_rails(plane, parsed)
    assert group == 7
    assert adapters == ["", MISSING]
    assert [(one.provider, one.rails) for one in plane.asked] == [
        ("verbs", ("mlx5_0", "mlx5_1")),
        ("tcp", ("eth0",)),
    ]
    assert rails.warnings(parsed, choice) == [f"falls back: {MISSING}"]


@pytest.mark.parametrize("text", ["provider: verbs", "{provider: verbs, rails: [mlx5_0]}"])
async def test_what_was_asked_for_is_not_exchanged(adapters: list[str], text: str) -> None:
    with pytest.raises(PlaneError, match="install libibverbs1"):
        await rails.open_rails(Plane(), config.parse(text))
    assert adapters == [""]


async def test_nothing_to_work_on_stops_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    def choose(*_: object) -> Choice:
        raise NoRailError("provider verbs: there is no RDMA device")

    monkeypatch.setattr(rails, "rails_of_this_host", choose)
    with pytest.raises(StartError, match="no RDMA device"):
        await rails.open_rails(Plane(), config.parse("provider: verbs"))


def test_options_reach_the_data_plane() -> None:
    parsed = config.parse(
        "{provider: verbs, verbs: {library: /l.so, gid_index: 0, pkey: 0x8001, mtu: 1024, "
        "service_level: 3, bulk_service_level: 2, traffic_class: 106, timeout: 18, retries: 2, "
        "port: 2, link_local: true, plain_posts: true}}"
    )
    options = rails.group_options(parsed, Choice((), (), (), "", "verbs"))
    assert options.library == "/l.so"
    assert options.verbs == VerbsOptions(2, 0, True, 0x8001, 3, 2, 106, 1024, 18, 2, True)
    native = ffi.new("struct tfd_verbs_options *")
    fill_verbs(native, options.verbs)
    told = (native.port, native.gid_given, native.gid_index, native.link_local, native.pkey)
    assert told == (2, 1, 0, 1, 0x8001)
    levels = (native.service_level, native.bulk_service_level, native.traffic_class, native.mtu)
    assert levels == (3, 2, 106, 1024)
    assert (native.timeout, native.retries, native.plain_posts) == (18, 2, 1)


def test_without_a_gid_the_rule_decides() -> None:
    native = ffi.new("struct tfd_verbs_options *")
    fill_verbs(native, rails.group_options(config.parse(""), NOTHING).verbs)
    assert (native.gid_given, native.timeout, native.retries) == (0, 14, 7)
    assert rails.group_options(config.parse("fabric: {library: /f.so}"), NOTHING).library == "/f.so"


NOTHING = Choice((), (), (), "", "tcp")


# ---- pinned memory ----


def limited(soft: int, hard: int) -> Callable[..., Any]:
    return lambda what: (soft, hard)


def test_the_limit_of_pinned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", limited(8 << 20, 8 << 20))
    monkeypatch.setattr(memlock, "_may_pass", lambda: False)
    assert memlock.limit() == 8 << 20
    monkeypatch.setattr(memlock, "_may_pass", lambda: True)
    assert memlock.limit() is None
    monkeypatch.setattr(memlock, "_may_pass", lambda: False)
    monkeypatch.setattr(resource, "getrlimit", limited(resource.RLIM_INFINITY, -1))
    assert memlock.limit() is None


def test_a_limit_that_is_too_small_is_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memlock, "limit", lambda: 8 << 20)
    monkeypatch.setattr(memlock, "ram", lambda: 24 * GIB)
    parsed = config.parse("tenants: [{name: a, quotas: {registered_bytes: 1GiB}}]")
    names = tuple(Verdict(Nic(name, "ACTIVE", 0), "") for name in ("mlx5_0", "mlx5_1"))
    (said,) = rails.warnings(parsed, Choice(names, (), (), "", "verbs"))
    assert "may pin 8 MiB (RLIMIT_MEMLOCK)" in said
    assert "register 1 GiB on each of 2 rails, which needs 2 GiB" in said
    for cure in ("LimitMEMLOCK=infinity", "ulimit -l unlimited", "IPC_LOCK"):
        assert cure in said
    assert not rails.warnings(parsed, Choice(names, (), (), "", "tcp")), "sockets pin nothing"


def test_more_than_the_host_has_is_not_asked_for() -> None:
    assert memlock.warning(None, 16 << 40, 8) == ""
    assert memlock.warning(24 * GIB, 24 * GIB, 1) == ""
    assert "needs 24 GiB" in memlock.warning(23 * GIB, 24 * GIB, 1)


def test_sizes_are_said_in_their_unit() -> None:
    assert [memlock.text(count) for count in (12, 65_536, 8 << 20, 3 << 29)] == [
        "12 bytes",
        "64 KiB",
        "8 MiB",
        "1.5 GiB",
    ]


@pytest.mark.parametrize(
    ("may_pin", "reason", "said"),
    [
        (8 << 20, "MEMLOCK", "the daemon may pin 8 MiB (RLIMIT_MEMLOCK): set LimitMEMLOCK"),
        (None, "MEMORY", "registering memory: no memory to pin"),
    ],
)
async def test_memory_that_cannot_be_pinned(
    monkeypatch: pytest.MonkeyPatch, may_pin: int | None, reason: str, said: str
) -> None:
    async def refuse(*_: object, writable: bool, address: int, memory: int) -> int:
        raise PlaneError(errno.ENOMEM, "no memory to pin")

    host = Host(Network(), 7001)
    session = await host.session()
    monkeypatch.setattr(memlock, "limit", lambda: may_pin)
    monkeypatch.setattr(host.plane, "region_add", refuse)
    with pytest.raises(errors.QuotaExceeded, match="no memory to pin") as caught:
        await host.region(session)
    assert caught.value.reason == reason
    assert said in caught.value.message
    await host.aclose()
    host.assert_nothing_left()


@pytest.mark.parametrize(
    ("staging", "gpus", "size"),
    [("auto", 0, 0), ("auto", 8, 64 << 20), ("on", 0, 64 << 20), ("off", 8, 0)],
)
def test_where_gpu_memory_is_staged(staging: str, gpus: int, size: int) -> None:
    parsed = config.parse(f"gpu: {{staging: {staging}}}")
    choice = Choice((), (), (), "", "tcp", gpus=gpus)
    assert rails.group_options(parsed, choice).staging_bytes == size


def test_rails_of_this_host_alone_make_no_host_ready() -> None:
    nic = rail("eth0", "tcp/1")
    twin, local, copies = (
        rail("staged/eth0", "staged/tcp/1"),
        rail("local", "local/2f6a"),
        rail("staged/local", "staged/local/2f6a"),
    )
    lost = replace(nic, state=RailState.DOWN)
    assert rails.any_up([nic, local, twin, copies])
    assert not rails.any_up([lost, local, replace(twin, state=RailState.DOWN), copies])
    assert rails.any_up([local, copies])
