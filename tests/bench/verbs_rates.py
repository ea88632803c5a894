# SPDX-License-Identifier: Apache-2.0
"""Writes by verbs within one guest, beside perftest on the same device; and many connections of it.

Both ends are in one guest, on one device over a network card that leads nowhere: what is between
them is the kernel's soft-RoCE alone, no link of the emulator's.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench import build, perftest, writes
from bench.guests import GuestEndpoint, join, telling
from bench.report import Row
from bench.stats import median, spread
from bench.turns import in_turn, ratios

from vm.daemons import GuestDaemon
from vm.guest import Guest, Machine
from vm.image import ensure

if TYPE_CHECKING:
    from collections.abc import Iterator

    from bench.topic import Run

KIB, MIB = 1 << 10, 1 << 20
DEVICE, ADDRESS = "rxe0", "10.78.0.1"
DEPTH = 16  # writes in flight, here and there
COUNTS = {64 * KIB: 1500, 1 * MIB: 100}  # of a run
LEAST = 0.85
PING_BYTES, PINGS = 8, 2000
PROVIDER_MOST, CLIENT_MOST = 1.5, 3.0
# The 0.2 ms of the default are some 15 us of a processor that is not emulated.
SPIN_S = 0.01
CPUS = 4  # of the guest, where this machine has them: two clients and two daemons poll
PORTS = (7471, 7475)  # of the daemons
SETS = 64
TURNS = 5  # at least; a turn takes seconds
PERFTEST, PROVIDER = "perftest", "provider"
CLIENT, SDK = "client to client", "SDK to SDK"


def rows(run: Run) -> list[Row]:
    """Measures all of it."""
    build.verbs_provider(), build.ping()  # before the guest looks for them
    with guest() as one:
        found = [sets_row(run, one)]
        with clients(one, max(COUNTS) * DEPTH) as (sender, receiver):
            for size, count in COUNTS.items():
                found.append(rate_row(run, one, sender, receiver, size, count))
        with clients(one, KIB, SPIN_S) as (sender, receiver):
            found += latency_rows(run, one, sender, receiver)
    return found


def cpus() -> int:
    """Tells how many processors the guest has."""
    return min(CPUS, len(os.sched_getaffinity(0)))


@contextlib.contextmanager
def guest() -> Iterator[Guest]:
    """Runs a guest with one device."""
    with (
        tempfile.TemporaryDirectory(prefix="tfd-") as folder,
        Guest(ensure(), Machine(name="host", cpus=cpus()), Path(folder)) as one,
    ):
        yield one


@contextlib.contextmanager
def clients(
    one: Guest, length: int, spin_s: float | None = None
) -> Iterator[tuple[GuestEndpoint, GuestEndpoint]]:
    """Runs two daemons on the one device, and a client of each.

    Args:
        one: Where.
        length: Bytes of a client's memory.
        spin_s: How long daemons and clients poll before they sleep; None: as by default.
    """
    keys = {"rails": [DEVICE], "spin": spin_s, "log_level": "warning"}
    arguments = () if spin_s is None else (str(spin_s * 1e6),)
    kind = "default" if spin_s is None else "polling"
    daemons = [
        GuestDaemon(
            one, {**keys, "peer_listen": f"127.0.0.1:{port}"}, name=f"{kind}{number}", port=port
        ).start()
        for number, port in enumerate(PORTS)
    ]
    with telling(*daemons), contextlib.ExitStack() as stack:
        for daemon in daemons:
            stack.callback(daemon.kill)
            daemon.wait_ready()
        made = [GuestEndpoint(daemon, length, arguments=arguments) for daemon in daemons]
        for endpoint in made:
            endpoint.wait_ready()
        sender, receiver = made
        join(sender, receiver)
        yield sender, receiver


def provider(one: Guest, *arguments: object) -> dict[str, Any]:
    """Runs native/verbs_provider.c."""
    words = [str(build.OUT / "verbs_provider"), DEVICE, *map(str, arguments)]
    result: dict[str, Any] = json.loads(one.run(words, cwd="/").stdout)
    return result


# ---- rates ----


def rate_row(
    run: Run, one: Guest, sender: GuestEndpoint, receiver: GuestEndpoint, size: int, count: int
) -> Row:
    """Measures writes of a size: by clients, by the provider alone, by perftest."""
    count = run.scaled(count)

    def by_clients() -> float:
        return writes.flood_gbps(sender, receiver, size, DEPTH, count)[0] * 1e9 / 8 / MIB

    by_clients()
    found = in_turn(
        run,
        {
            CLIENT: by_clients,
            PERFTEST: lambda: perftest.write_mib_s(one, DEVICE, ADDRESS, size, DEPTH, count),
            PROVIDER: lambda: float(provider(one, "bw", size, DEPTH, count)["mib_s"]),
        },
        turns(run),
    )
    name = f"verbs: write {size // KIB} KiB"
    for what in (CLIENT, PROVIDER, PERFTEST):
        run.beside(f"{name}: {what}", f"{spread(found[what], 1)} MiB/s")
    by_provider = ratios(found, PROVIDER, PERFTEST)
    run.beside(f"{name}: {PROVIDER}, ratio to ib_write_bw", spread(by_provider))
    by_turn = ratios(found, CLIENT, PERFTEST)
    note = f"{DEPTH} in flight; provider {median(by_provider):.2f}; ratios {spread(by_turn)}"
    return Row(f"{name}, {CLIENT}, ratio to ib_write_bw", median(by_turn), "", ">=", LEAST, note)


def turns(run: Run) -> int:
    """Tells how many turns to measure."""
    return max(TURNS, run.turns // 2)


# ---- latency ----


def latency_rows(run: Run, one: Guest, sender: GuestEndpoint, receiver: GuestEndpoint) -> list[Row]:
    """Measures 8 bytes one way, each time the median of a run."""
    count = run.scaled(PINGS)

    def by_clients(native: bool) -> float:
        return writes.ping(sender, receiver, PING_BYTES, count, native=native).p50_us

    found = in_turn(
        run,
        {
            CLIENT: lambda: by_clients(native=True),
            PERFTEST: lambda: perftest.send_us(one, DEVICE, ADDRESS, PING_BYTES, count),
            PROVIDER: lambda: float(provider(one, "lat", PING_BYTES, count)["p50_us"]),
            SDK: lambda: by_clients(native=False),
        },
        turns(run),
    )
    for what in (CLIENT, SDK, PROVIDER, PERFTEST):
        run.beside(f"verbs: {PING_BYTES} bytes one way: {what}", f"{spread(found[what], 1)} µs")
    made = []
    for what, most in ((PROVIDER, PROVIDER_MOST), (CLIENT, CLIENT_MOST)):
        by_turn = ratios(found, what, PERFTEST)
        bar = f"verbs: WriteImm of {PING_BYTES} bytes one way, {what}, ratio to ib_send_lat"
        medians = f"{median(found[what]):.1f} of {median(found[PERFTEST]):.1f} µs"
        note = f"{medians}; {cpus()} processors; ratios {spread(by_turn)}"
        made.append(Row(bar, median(by_turn), "", "<=", most, note))
    return made


# ---- many connections ----


def sets_row(run: Run, one: Guest) -> Row:
    """Makes connections to 64 halves one by one, and lets each carry a write."""
    found = provider(one, "sets", SETS)
    pairs, memory = found["pairs"], (found["rss_kib"], found["far_rss_kib"], found["host_kib"])
    opened, started, exchanged = (
        f"{found[stage] / 1e3:.2f} ms" for stage in ("open_us", "start_us", "exchange_us")
    )
    note = (
        f"each: open {opened}, start {started}, exchange {exchanged} (medians); "
        f"{pairs} QPs; RSS {memory[0]:.0f} KiB, "
        f"{memory[1]:.0f} at the far side; the host's memory {memory[2]:.0f} KiB for both sides"
    )
    run.beside(
        f"verbs: completion queues of a device, however many sets ({pairs * SETS} QPs here)",
        f"{found['send_cq']} sends, {found['recv_cq']} receives, an SRQ of {found['receives']}",
    )
    bar = f"verbs: remote QP sets on one device that each carried a write (of {SETS})"
    return Row(bar, found["sets"], "", ">=", SETS, note)
