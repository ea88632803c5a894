# SPDX-License-Identifier: Apache-2.0
"""Steps of a model on a GPU, captured in a graph, whose pages go to a decoder meanwhile.

The model and its prefiller are in this process, the decoder, with the same model, in another one:
on the same GPU, where it does not compute while the step runs, and on a second GPU, if there is
one. Besides, the same through host memory and tcp, by two daemons.
"""

from __future__ import annotations

import contextlib
import importlib.util
import sys
import traceback
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import transferd
from bench.pair import daemons
from bench.report import Row
from bench.stats import median, spread
from transferd.client.cuda import driver as drivers
from transferd.kv.push import Pushes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from bench.kv_gpu_decoder import DecoderProcess
    from bench.topic import Run

    from support.daemon import DaemonProcess
    from support.kv_graph import Prefills, PushedPrefills

REQUESTS, TOKENS = 4, 2048
ROUNDS, STAGED_ROUNDS = 30, 4
BUMPED_EVERY = 3
GENERATED = 16
SLOWED_PERCENT, LATE_LAYERS = 3.0, 1.0
STAGED: dict[str, Any] = {"provider": "tcp", "gpu": {"staging": "on"}}


@dataclass
class Found:
    """What the rounds on one way have found.

    Attributes:
        plain: Seconds of steps that push nothing.
        pushed: Of those that do.
        bumped: Percent by which a step takes longer that counts its layers and pushes nothing.
        late: From the end of the last layer until all pages were there, in seconds.
        first: From the end of the last layer back to when the first one was there.
        checked: Requests whose pages, and tokens behind them, were compared.
        equal: Those that were equal.
    """

    plain: list[float] = field(default_factory=list)
    pushed: list[float] = field(default_factory=list)
    bumped: list[float] = field(default_factory=list)
    late: list[float] = field(default_factory=list)
    first: list[float] = field(default_factory=list)
    checked: int = 0
    equal: int = 0


class Way:
    """A prefiller here and a decoder there.

    Attributes:
        pushed: The prefiller.
        found: What was measured.
    """

    def __init__(self, pushed: PushedPrefills, there: DecoderProcess) -> None:
        """Has made no step."""
        self.pushed = pushed
        self._there = there
        self._address = pushed.rank.address.hex()
        self._rounds = 0
        self.found = Found()

    def round(self, *, check: bool) -> None:
        """Measures a step without and one with pages that go, every second time in reverse.

        Args:
            check: Whether pages, and tokens behind them, are compared.
        """
        self._rounds += 1
        calls: list[Callable[[], None]] = [self._plain, lambda: self._push(check)]
        for call in calls if self._rounds % 2 else reversed(calls):
            call()
        if self._rounds % BUMPED_EVERY == 0 and not check:  # generating lets the GPU cool down
            bumped = self.pushed.bumped()[0]
            self.found.bumped.append((bumped / self.found.plain[-1] - 1) * 100)

    def _plain(self) -> None:
        side = self.pushed.side
        side.renew()
        self.found.plain.append(side.place.timed(side.plain, side.plain)[0])

    def _push(self, check: bool) -> None:
        pushed, there, found = self.pushed, self._there, self.found
        ids = [f"{self._rounds} {n}" for n in range(pushed.side.requests)]
        pushed.begin(ids)
        there.ask("ask", ids=ids, address=self._address)
        there.tell("landed")
        took, end = pushed.step(ids)
        tokens = pushed.finish(ids)
        times = there.answer()
        found.pushed.append(took)
        found.late.append(times["last"] - end)
        found.first.append(end - times["first"])
        came = there.ask("tokens")["tokens"]
        if check:
            pages = there.ask("digests")["digests"] == pushed.side.digests()
            theirs = there.ask("generate", first=came, count=GENERATED)["tokens"]
            ours = pushed.side.generate(tokens, GENERATED)
            found.checked += len(ids)
            found.equal += sum(
                pages and came[n] == tokens[n] and theirs[n] == ours[n] for n in range(len(ids))
            )
        pushed.release(ids)


@contextlib.contextmanager
def way(
    side: Prefills, there: DecoderProcess, prefills: DaemonProcess, decodes: DaemonProcess
) -> Iterator[Way]:
    """Attaches both; what fails shows the daemons' logs."""
    try:
        with transferd.Client(prefills.socket) as client:
            from support.kv_graph import PushedPrefills

            with contextlib.closing(PushedPrefills(side, client)) as pushed:
                there.ask("attach", socket=decodes.socket, address=pushed.rank.address.hex())
                yield Way(pushed, there)
                there.ask("detach")
    except BaseException:
        for daemon in dict.fromkeys((prefills, decodes)):
            print(f"log of {daemon.directory}:\n{daemon.log()[-8000:]}", file=sys.stderr)
        raise


@contextlib.contextmanager
def paths() -> Iterator[Counter[str]]:
    """Counts on which paths the jobs of prefillers of this process go."""
    seen: Counter[str] = Counter()
    owner: Any = Pushes
    landed = owner._landed

    def noted(pushes: Pushes, job: transferd.Job, unit: Any) -> None:
        seen[str(job.path)] += 1
        landed(pushes, job, unit)

    owner._landed = noted
    try:
        yield seen
    finally:
        owner._landed = landed


def rows(run: Run) -> Iterator[Row]:
    """Measures the bars."""
    if importlib.util.find_spec("torch") is None:
        run.skip("steps of a graph whose pages go", "torch is not installed")
        return
    from bench.kv_gpu_decoder import DecoderProcess

    from support.kv_graph import Cuda, Prefills
    from support.kv_llama import LlamaShape

    shape = LlamaShape()
    side = Prefills(Cuda(0), shape, REQUESTS, TOKENS)
    about(run, side)
    devices = drivers.load().device_count()
    for device, where in enumerate(("same GPU", "second GPU")):
        if device >= devices:
            run.skip(f"{where}: steps whose pages go", "this machine has one GPU")
            continue
        with DecoderProcess(str(device), shape, REQUESTS, TOKENS) as there:
            assert there.about["checksum"] == side.model.checksum(), "the models differ"
            with daemons(1) as (one,), way(side, there, one, one) as made:
                yield from bars(run, where, made, side)
            if device == 0:
                staged(run, side, there)


def about(run: Run, side: Prefills) -> None:
    """Tells of the model, and its steps alone."""
    shape = side.shape
    times = [side.place.timed(side.plain, side.plain)[0] for _ in range(3)]
    flops = shape.prefill_flops(side.requests, side.tokens)
    run.beside(
        f"a step: {shape.layers} layers, {side.requests} x {side.tokens} tokens",
        f"{median(times) * 1e3:.1f} ms, {flops / median(times) / 1e12:.0f} TFLOP/s",
    )
    run.beside("weights", f"{side.model.weight_bytes / 1e9:.1f} GB of {shape.dtype}")
    pages = side.prompt_pages.numel()
    page = shape.token_bytes * shape.page_tokens
    run.beside(
        "pages of a step",
        f"{shape.layers} x {pages} of {page >> 10} KiB: {shape.layers * pages * page >> 20} MiB",
    )


def bars(run: Run, where: str, made: Way, side: Prefills) -> Iterator[Row]:
    """Measures a way by its bars."""
    found, layer = told(run, where, made, run.scaled(ROUNDS))
    slowed = percent(found.pushed, found.plain)
    note = (
        f"{spread(slowed)}; {spread(milliseconds(found.pushed), 1)} ms, "
        f"{spread(milliseconds(found.plain), 1)} without"
    )
    bar = f"{where}: a step whose pages go takes longer by"
    yield Row(bar, median(slowed), "%", "<=", SLOWED_PERCENT, note)
    note = f"{spread(milliseconds(found.late))} ms; a layer takes {layer * 1e3:.2f}"
    bar = f"{where}: the last page is there after the last layer, in layers"
    yield Row(bar, median(found.late) / layer, "", "<=", LATE_LAYERS, note)
    bar = f"{where}: requests with equal pages and the same {GENERATED} tokens behind them"
    yield Row(bar, found.equal, "", ">=", found.checked)


def staged(run: Run, side: Prefills, there: DecoderProcess) -> None:
    """Tells the same through host memory, by two daemons over tcp, for which there is no bar."""
    where = "staged over tcp"
    try:
        with daemons(2, **STAGED) as (near, far), way(side, there, near, far) as made:
            found, layer = told(run, where, made, run.scaled(STAGED_ROUNDS))
    except Exception as error:  # the bars of a second GPU are measured all the same
        traceback.print_exc()
        run.skip(where, repr(error))
        return
    run.beside(
        f"{where}: a step takes longer by; last page after the last layer",
        f"{median(percent(found.pushed, found.plain)):.1f} %; "
        f"{median(found.late) * 1e3:.0f} ms, {median(found.late) / layer:.1f} layers",
    )
    run.beside(f"{where}: requests that are equal", f"{found.equal} of {found.checked}")


def told(run: Run, where: str, made: Way, rounds: int) -> tuple[Found, float]:
    """Makes rounds, and tells how pages went; gives what was found, and a layer's seconds."""
    made.round(check=False)  # what is met for the first time
    made.found = found = Found()
    with paths() as seen:
        for number in range(rounds):
            made.round(check=number in (0, rounds - 1))
    by = ", ".join(f"{count} jobs by {path}" for path, count in seen.items())
    run.beside(f"{where}: {rounds} rounds", by)
    run.beside(
        f"{where}: first layer there before the end of the last one, ms",
        f"{spread(milliseconds(found.first), 1)} of {median(found.pushed) * 1e3:.1f}",
    )
    if found.bumped:
        what = f"{where}: a step that counts its layers, and pushes nothing, takes longer by"
        run.beside(what, f"{spread(found.bumped)} %")
    return found, median(found.plain) / made.pushed.side.shape.layers


def milliseconds(times: Sequence[float]) -> list[float]:
    """Of seconds."""
    return [1e3 * t for t in times]


def percent(times: Sequence[float], others: Sequence[float]) -> list[float]:
    """Tells round by round how much longer one took."""
    return [(a / b - 1) * 100 for a, b in zip(times, others, strict=True)]
