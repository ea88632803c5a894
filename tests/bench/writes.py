# SPDX-License-Identifier: Apache-2.0
"""How fast writes are: rate and latency, beside the raw provider in the same run.

A machine's speed may change by a factor of two within seconds. So the two are measured in turn, the
ratio is taken per turn, and the median of the ratios counts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from bench import raw_provider
from bench.stats import median, percentile

if TYPE_CHECKING:
    from bench.quiet import Gate
    from bench.random_pages import Shape

PING_WARM_UP = 300
FLOOD_IMM, PING_IMM = 1, 2


class Commanded(Protocol):
    """A client process that takes commands, wherever it runs."""

    def tell(self, do: str, **arguments: Any) -> None:
        """Sends it a command."""

    def answer(self) -> dict[str, Any]:
        """Reads the answer to the oldest command."""

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        """Sends it a command and reads the answer."""


@dataclass(frozen=True, slots=True)
class Rate:
    """What one size reached.

    Attributes:
        ratios: Daemons to the better raw variant, one for each turn.
        daemons_gbps: One for each turn.
        raw_gbps: Of the better variant, one for each turn.
        raw_variant: Which was better.
        other_raw_gbps: Median of the other.
        path: What the jobs used.
    """

    ratios: list[float]
    daemons_gbps: list[float]
    raw_gbps: list[float]
    raw_variant: str
    other_raw_gbps: float
    path: str


def flood_gbps(
    sender: Commanded, receiver: Commanded, size: int, window: int, count: int, *, page: int = 0
) -> tuple[float, str]:
    """Measures once; from the first call until the receiver saw the last count.

    Args:
        sender: Writes.
        receiver: Counts.
        size: Bytes of each job.
        window: Jobs in flight.
        count: Jobs in all.
        page: Bytes of each page, where a job writes pages.

    Returns:
        The rate, and what the last job used.
    """
    receiver.tell("landed", count=count, imm=FLOOD_IMM)
    sent = sender.ask("flood", size=size, window=window, count=count, imm=FLOOD_IMM, page=page)
    seconds = (receiver.answer()["seen_ns"] - sent["begin_ns"]) / 1e9
    return count * size * 8 / seconds / 1e9, sent["path"]


def rate(
    sender: Commanded,
    receiver: Commanded,
    size: int,
    window: int,
    count: int,
    turns: int,
    gate: Gate,
) -> Rate:
    """Measures daemons and raw provider in turn."""
    flood_gbps(sender, receiver, size, window, 2 * window)
    daemons: list[float] = []
    whole: list[float] = []
    cut: list[float] = []
    path = ""
    with (
        raw_provider.whole(size, window, count) as in_one,
        raw_provider.cut(size, window, count) as in_segments,
    ):
        raw_runs = [(whole, in_one), (cut, in_segments)]
        for _ in range(turns):
            gate.wait()
            raw_runs.reverse()  # each is as often before the daemons as after them
            (before, run_before), (after, run_after) = raw_runs
            before.append(run_before.gbps())
            gbps, path = flood_gbps(sender, receiver, size, window, count)
            daemons.append(gbps)
            after.append(run_after.gbps())
    name, better, other = better_variant(size, whole, cut)
    ratios = [mine / theirs for mine, theirs in zip(daemons, better, strict=True)]
    return Rate(ratios, daemons, better, name, other, path)


def better_variant(
    size: int, whole: list[float], cut: list[float]
) -> tuple[str, list[float], float]:
    """Chooses what to compare with; returns its name, its figures, the other's median.

    The better one by medians, not turn by turn: the larger of two noisy figures flatters. Where a
    message is one segment the two are the same, and both runs of a turn are averaged.
    """
    if size <= raw_provider.SEGMENT:
        both = [(one + other) / 2 for one, other in zip(whole, cut, strict=True)]
        return "whole, as it is one segment", both, median(both)
    if median(whole) > median(cut):
        return "whole", whole, median(cut)
    return "in segments", cut, median(whole)


@dataclass(frozen=True, slots=True)
class Latency:
    """One way, in microseconds."""

    p50_us: float
    p99_us: float


def ping(one: Commanded, other: Commanded, size: int, count: int, *, native: bool) -> Latency:
    """Measures from the call of write() until the other side's wait for the counter returned.

    The two write in turn, so that exactly one write is in flight.
    """
    do = "ping_native" if native else "ping"
    total = PING_WARM_UP + count
    other.tell(do, size=size, count=total, imm=PING_IMM, first=False)
    here = one.ask(do, size=size, count=total, imm=PING_IMM, first=True)
    there = other.answer()
    forth = zip(here["called_ns"], there["seen_ns"], strict=True)
    back = zip(there["called_ns"], here["seen_ns"], strict=True)
    samples = [
        (seen - called) / 1e3 for way in (forth, back) for called, seen in list(way)[PING_WARM_UP:]
    ]
    return Latency(percentile(samples, 50), percentile(samples, 99))


def pages_gbps(
    sender: Commanded, receiver: Commanded, shape: Shape, window: int, count: int
) -> float:
    """Measures jobs of pages once; as :func:`flood_gbps`."""
    sizes = {"page": shape.page, "pages": shape.pages, "set_bytes": shape.set_bytes}
    receiver.tell("landed", count=count, imm=FLOOD_IMM)
    sent = sender.ask("flood_pages", **sizes, window=window, count=count, imm=FLOOD_IMM)
    seconds = (int(receiver.answer()["seen_ns"]) - int(sent["begin_ns"])) / 1e9
    return count * shape.job_bytes * 8 / seconds / 1e9


def prepare_pages(sender: Commanded, shape: Shape) -> None:
    """Lets the sender make the tables of a shape."""
    sender.ask("prepare_pages", page=shape.page, pages=shape.pages, set_bytes=shape.set_bytes)
