# SPDX-License-Identifier: Apache-2.0
"""``transferd demo weights``: a model's weights from one process to another, and the proof."""

from __future__ import annotations

import contextlib
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from transferd.client.child import Child
from transferd.client.ctl.render import bytes_text
from transferd.client.demo import model
from transferd.client.demo.daemons import DemoDaemon

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from rich.console import Console

    # Measures the bare provider on writes of these sizes; Gbps, or the reason why it cannot.
    MeasureRaw = Callable[[list[int]], float | str]

MODULE = "transferd.client.demo"


@dataclass(frozen=True, slots=True)
class Outcome:
    """What the demo found.

    Attributes:
        tensors: How many were sent.
        layers: In how many layers.
        bytes: In all.
        seconds: Of each round, from the first call until the receiver saw the last count.
        path: Of the jobs.
        provider: Of the sender's daemon.
        raw: Rate of the bare provider in Gbps, or why it was not measured.
        wrong: Tensors whose hash differs.
        counted: Whether the counters told exactly the number of writes.
        embedding_equal: Whether both processes computed the same embedding.
        embedding: Its first numbers, for people.
    """

    tensors: int
    layers: int
    bytes: int
    seconds: list[float]
    path: str
    provider: str
    raw: float | str
    wrong: list[str]
    counted: bool
    embedding_equal: bool
    embedding: list[float]

    @property
    def gbps(self) -> float:
        """Median rate."""
        return self.bytes * 8 / statistics.median(self.seconds) / 1e9

    @property
    def good(self) -> bool:
        """Whether every check passed."""
        return not self.wrong and self.counted and self.embedding_equal


@contextlib.contextmanager
def step(console: Console, text: str) -> Iterator[None]:
    """Shows what is being done, and how long it took."""
    started = time.monotonic()
    with console.status(f"{text} …"):
        yield
    console.print(f"  {text} [dim]({time.monotonic() - started:.1f} s)[/dim]")


def run(console: Console, rounds: int, measure_raw: MeasureRaw) -> Outcome:
    """Runs the demo.

    Args:
        console: Shows the progress.
        rounds: How often the whole model is sent.
        measure_raw: See the type.

    Raises:
        TransferdError: It could not be run to its end.
    """
    folder = model.find_folder()
    with contextlib.ExitStack() as stack:
        base = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="tfd-", dir="/tmp")))
        with step(console, "two daemons start"):
            daemons = []
            for name in ("a", "b"):
                (base / name).mkdir()
                daemons.append(stack.enter_context(DemoDaemon(base / name)))
            for daemon in daemons:
                daemon.wait_ready()
        with step(console, "two clients attach; the sender reads the model into its region"):
            sender = stack.enter_context(Child(f"{MODULE}.sender", daemons[0].address, str(folder)))
            receiver = stack.enter_context(Child(f"{MODULE}.receiver", daemons[1].address))
            plan = sender.read()
            descriptor = receiver.ask(do="plan", **plan)["descriptor"]
            sender.ask(do="warm", descriptor=descriptor)
        with step(console, f"every tensor goes over, one WriteImm each, {rounds} times"):
            transfers = [_transfer(sender, receiver, descriptor) for _ in range(rounds)]
        with step(console, "both sides hash the tensors and compute an embedding"):
            sender.tell(do="hashes")
            found = receiver.ask(do="check")
            wanted = sender.read()
    with step(console, "the bare provider does the same"):
        raw = measure_raw([tensor["length"] for tensor in plan["tensors"]])
    return _judge(plan, transfers, found, wanted, raw)


def _transfer(sender: Child, receiver: Child, descriptor: str) -> dict[str, Any]:
    """Sends the model once, into cleared memory."""
    receiver.ask(do="clear")
    receiver.tell(do="wait")
    sent = sender.ask(do="send", descriptor=descriptor)
    landed = receiver.read()
    return {**sent, **landed}


def _judge(
    plan: dict[str, Any],
    transfers: list[dict[str, Any]],
    found: dict[str, Any],
    wanted: dict[str, Any],
    raw: float | str,
) -> Outcome:
    tensors = plan["tensors"]
    return Outcome(
        tensors=len(tensors),
        layers=len({tensor["layer"] for tensor in tensors}),
        bytes=sum(tensor["length"] for tensor in tensors),
        seconds=[(each["landed_ns"] - each["started_ns"]) / 1e9 for each in transfers],
        path=transfers[-1]["path"],
        provider=transfers[-1]["provider"],
        raw=raw,
        wrong=sorted(
            name for name, sha in wanted["sha256"].items() if found["sha256"].get(name) != sha
        ),
        counted=found["counted"],
        embedding_equal=found["embedding"] == wanted["embedding"],
        embedding=found["embedding"][:4],
    )


def show(console: Console, outcome: Outcome) -> None:
    """Prints the summary."""
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold")
    table.add_column()
    median = statistics.median(outcome.seconds)
    table.add_row("sent", f"{outcome.tensors} tensors in {outcome.layers} layers")
    table.add_row("bytes", f"{bytes_text(outcome.bytes)} ({outcome.bytes:,})")
    table.add_row("time", f"{median * 1e3:.1f} ms, median of {len(outcome.seconds)} rounds")
    table.add_row("rate", f"{outcome.gbps:.1f} Gbps")
    if isinstance(outcome.raw, str):
        table.add_row("to raw provider", f"not measured: {outcome.raw}")
    else:
        table.add_row(
            "to raw provider", f"{outcome.gbps / outcome.raw:.2f} of its {outcome.raw:.1f} Gbps"
        )
    table.add_row("path", f"{outcome.path} ({outcome.provider})")
    good, bad = "[green]yes[/green]", "[red]NO[/red]"
    table.add_row("counters exact", good if outcome.counted else bad)
    hashed = f"{outcome.tensors - len(outcome.wrong)} of {outcome.tensors}"
    table.add_row("SHA-256 equal", f"{good if not outcome.wrong else bad}, {hashed}")
    numbers = ", ".join(f"{value:.4f}" for value in outcome.embedding)
    table.add_row(
        "embedding equal", f"{good if outcome.embedding_equal else bad}, [dim]{numbers}, …[/dim]"
    )
    console.print()
    console.print(table)
    for name in outcome.wrong:
        console.print(f"[red]wrong bytes: {name}[/red]")
