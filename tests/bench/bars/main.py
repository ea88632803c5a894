# SPDX-License-Identifier: Apache-2.0
"""The bars of a write with immediate between two daemons, and of the daemons themselves."""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING

from bench import calls, peers, processes, quickstart, raw_provider, writes
from bench.pair import daemons, endpoints, on_cores
from bench.report import Report, Row
from bench.stats import median, spread

if TYPE_CHECKING:
    from bench.options import Options
    from bench.pair import Endpoint

    from support.daemon import DaemonProcess

KIB, MIB = 1 << 10, 1 << 20
WINDOW = 4  # jobs in flight, here, in the raw provider and in the peers
# size: (least ratio to the raw provider, writes of a run)
RATES = {32 * MIB: (0.95, 32), 1 * MIB: (0.90, 1000)}
PEER_FACTOR = 2.0
LATENCY_BYTES = 4 * KIB
P50_US, P99_US = 45.0, 150.0
OVER_RAW_US, MANY_CORES = 6.0, 16
SUBMIT_ONE_MS, SUBMIT_BATCH_MS = 1.5, 15.0
IDLE_S, IDLE_PERCENT = 10.0, 1.0
RSS_MIB, SEGMENT_MIB = 120.0, 4.0
CYCLES, CYCLES_WARM_UP = 1000, 50
SETTLE_S = 10.0


def measure(options: Options) -> Report:
    """Measures everything.

    Args:
        options: Of the command line.

    Returns:
        A row for each bar that this machine can tell about.
    """
    report = Report("main")
    steps = {
        "rates of writes": write_rates,
        "latency on 2 cores": latency_on_two_cores,
        "latency on many cores": latency_on_many_cores,
        "gRPC Submit": submit,
        "idle daemons, memory": idle,
        "opening and closing sessions": cycles,
        "quickstart": first_steps,
    }
    for name, step in steps.items():
        with options.step(name) as wanted:
            if wanted:
                step(options, report)
    loads = options.gate.loads
    if loads:
        report.beside.append(("other work on this machine, cores", spread(loads)))
    return report


# ---- rates ----


def write_rates(options: Options, report: Report) -> None:
    """Measures large writes against the raw provider and the peers."""
    with daemons() as pair, endpoints(pair, max(RATES) * WINDOW) as (one, other):
        for size, (least, count) in RATES.items():
            write_rate(options, report, one, other, size, least, count)


def write_rate(
    options: Options,
    report: Report,
    one: Endpoint,
    other: Endpoint,
    size: int,
    least: float,
    count: int,
) -> None:
    """Measures one size."""
    name = f"write {size // MIB} MiB through ring and two daemons"
    found = writes.rate(one, other, size, WINDOW, count, options.turns, options.gate)
    raw = median(found.raw_gbps)
    reached = peers.measure(
        size,
        WINDOW,
        count,
        lambda why: report.skipped.append((f"{size // MIB} MiB by a peer", why)),
    )
    limit = least
    beside = ""
    if reached:
        best = max(reached, key=lambda peer: reached[peer])
        limit = min(least, PEER_FACTOR * reached[best] / raw)
        beside = f"; {median(found.daemons_gbps) / reached[best]:.1f} x {best}"
    report.rows.append(
        Row(
            f"{name}, ratio to the raw provider",
            median(found.ratios),
            "",
            ">=",
            limit,
            f"{median(found.daemons_gbps):.1f} of {raw:.1f} Gbps (raw {found.raw_variant}); "
            f"ratios {spread(found.ratios)}{beside}",
        )
    )
    label = f"{size // MIB} MiB, {WINDOW} in flight"
    report.beside.append((f"{label}: daemons, {found.path}", f"{spread(found.daemons_gbps)} Gbps"))
    report.beside.append((f"{label}: raw {found.raw_variant}", f"{spread(found.raw_gbps)} Gbps"))
    report.beside.append((f"{label}: raw the other way", f"{found.other_raw_gbps:.2f} Gbps"))
    report.beside.extend((f"{label}: {peer}", f"{gbps:.2f} Gbps") for peer, gbps in reached.items())


# ---- latency ----


def latency_on_two_cores(options: Options, report: Report) -> None:
    """Measures 4 KiB writes one at a time, all processes on two cores."""
    count = options.scaled(3000)
    with on_cores(2) as enough:
        if not enough:
            report.skipped.append(("submit to counter on 2 cores", "there is only one"))
            return
        with daemons() as pair, endpoints(pair, MIB) as (one, other):
            found, native, raw = latencies(options, one, other, count)
    p50s, p99s = [each.p50_us for each in found], [each.p99_us for each in found]
    name = "submit to the receiver's counter, 4 KiB, 2 cores"
    report.rows.append(Row(f"{name}, p50", median(p50s), "µs", "<=", P50_US, spread(p50s, 1)))
    report.rows.append(Row(f"{name}, p99", median(p99s), "µs", "<=", P99_US, spread(p99s, 1)))
    report_latencies(report, "2 cores", native, raw)


def latency_on_many_cores(options: Options, report: Report) -> None:
    """Measures the same with cores enough, against the raw provider."""
    name = f"submit to the receiver's counter, 4 KiB, {MANY_CORES} cores, over raw, p50"
    cores = len(os.sched_getaffinity(0))
    if cores < MANY_CORES:
        report.skipped.append((name, f"needs {MANY_CORES} cores, here are {cores}"))
        return
    with daemons() as pair, endpoints(pair, MIB) as (one, other):
        found, native, raw = latencies(options, one, other, options.scaled(10_000))
    over = [mine.p50_us - theirs.p50_us for mine, theirs in zip(found, raw, strict=True)]
    report.rows.append(Row(name, median(over), "µs", "<=", OVER_RAW_US, spread(over, 1)))
    p50s = [each.p50_us for each in found]
    report.beside.append((f"4 KiB, {cores} cores: SDK p50", f"{spread(p50s, 1)} µs"))
    report_latencies(report, f"{cores} cores", native, raw)


def latencies(
    options: Options, one: Endpoint, other: Endpoint, count: int
) -> tuple[list[writes.Latency], list[writes.Latency], list[writes.Latency]]:
    """Measures SDK, native client half and raw provider in turn."""
    found, native, raw = [], [], []
    for _ in range(options.turns):
        options.gate.wait()
        found.append(writes.ping(one, other, LATENCY_BYTES, count, native=False))
        native.append(writes.ping(one, other, LATENCY_BYTES, count, native=True))
        raw.append(writes.Latency(*raw_provider.latency_us(LATENCY_BYTES, count)))
    return found, native, raw


def report_latencies(
    report: Report, where: str, native: list[writes.Latency], raw: list[writes.Latency]
) -> None:
    """Puts what no bar asks for beside."""
    for name, all_of in (("native client half", native), ("raw provider", raw)):
        p50s, p99s = [each.p50_us for each in all_of], [each.p99_us for each in all_of]
        report.beside.append((f"4 KiB, {where}: {name} p50", f"{spread(p50s, 1)} µs"))
        report.beside.append((f"4 KiB, {where}: {name} p99", f"{spread(p99s, 1)} µs"))


# ---- control plane ----


def submit(options: Options, report: Report) -> None:
    """Times TransferService.Submit."""
    with daemons() as pair:
        sender, receiver = pair
        found = calls.submit_times(sender, receiver, options.scaled(400), options.scaled(30))
    worst = "worst {:.2f} ms".format
    report.rows.append(
        Row(
            "gRPC Submit, one job",
            found.one_ms,
            "ms",
            "<=",
            SUBMIT_ONE_MS,
            worst(found.one_worst_ms),
        )
    )
    report.rows.append(
        Row(
            f"gRPC Submit, one call of {calls.BATCH:,} jobs",
            found.batch_ms,
            "ms",
            "<=",
            SUBMIT_BATCH_MS,
            worst(found.batch_worst_ms),
        )
    )


# ---- the daemon itself ----


def idle(options: Options, report: Report) -> None:
    """Measures two daemons with a session each that hold a grant of each other and do nothing."""
    with daemons() as pair, endpoints(pair, MIB) as (one, _other):
        time.sleep(1.0)  # what starting has left behind
        before = [processes.cpu_seconds(daemon.pid) for daemon in pair]
        begin = time.monotonic()
        time.sleep(IDLE_S)
        elapsed = time.monotonic() - begin
        shares = [
            100 * (processes.cpu_seconds(daemon.pid) - then) / elapsed
            for daemon, then in zip(pair, before, strict=True)
        ]
        memory = [processes.rss_bytes(daemon.pid) / MIB for daemon in pair]
        segment = one.about["segment_bytes"] / MIB
    report.rows.append(
        Row(
            f"idle {IDLE_S:.0f} s, two daemons, one session each: a core's share, the busier one",
            max(shares),
            "%",
            "<=",
            IDLE_PERCENT,
            " and ".join(f"{share:.2f} %" for share in shares),
        )
    )
    note = " and ".join(f"{size:.0f}" for size in memory)
    report.rows.append(
        Row("daemon's memory with one session (RSS)", max(memory), "MiB", "<=", RSS_MIB, note)
    )
    report.rows.append(Row("session's segment by default", segment, "MiB", "<=", SEGMENT_MIB))


def cycles(options: Options, report: Report) -> None:
    """Opens and closes sessions; nothing may be left of them."""
    count = options.scaled(CYCLES)
    with daemons() as pair, endpoints(pair, MIB) as (one, other):
        far = other.about["descriptor"]
        one.ask("cycle", count=CYCLES_WARM_UP, far=far)
        before = [settled(daemon) for daemon in pair]
        memory = processes.rss_bytes(pair[0].pid)
        took = one.ask("cycle", count=count, far=far)["seconds"]
        after = [settled(daemon, then) for daemon, then in zip(pair, before, strict=True)]
        grown_kib = (processes.rss_bytes(pair[0].pid) - memory) / KIB
    growth = [now.growth(then) for now, then in zip(after, before, strict=True)]
    for name in growth[0]:
        both = [each[name] for each in growth]
        report.rows.append(
            Row(
                f"session open + close, {count:,} times: growth of {name.replace('_', ' ')}",
                max(both),
                "",
                "<=",
                0,
                f"of the two daemons: {both[0]} and {both[1]}",
            )
        )
    for which, now, then in zip(("their", "the other"), after, before, strict=True):
        if news := now.news(then):
            report.beside.append((f"new after the sessions, {which} daemon", news))
    report.beside.append(("session opened, used and closed", f"{took / count * 1e3:.1f} ms each"))
    report.beside.append((f"growth of RSS over {count:,} sessions", f"{grown_kib:,.0f} KiB"))


def settled(daemon: DaemonProcess, goal: processes.Holdings | None = None) -> processes.Holdings:
    """Counts what a daemon holds once it has let go of what it still was about to release.

    Args:
        daemon: The daemon.
        goal: It is waited for, up to a bound, until no number is above these; None: until two
            counts in a row are the same.
    """
    end = time.monotonic() + SETTLE_S
    previous = None
    while True:
        registered_bytes = daemon.status().registered_bytes
        time.sleep(0.5)  # the connection of that question is gone by then
        now = processes.holdings(daemon.pid, registered_bytes)
        done = previous == now if goal is None else max(now.growth(goal).values()) <= 0
        if done or time.monotonic() > end:
            return now
        previous = now


def first_steps(options: Options, report: Report) -> None:
    """Times deploy/quickstart demo in a fresh clone."""
    limits = quickstart.LIMITS_S
    if not options.full:
        report.skipped.append(("quickstart demo, first and second run", "takes minutes (--full)"))
        return
    for (name, limit), seconds in zip(limits.items(), quickstart.times(), strict=True):
        report.rows.append(Row(f"quickstart demo, {name} run", seconds, "s", "<=", limit))
