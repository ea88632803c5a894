# SPDX-License-Identifier: Apache-2.0
"""vLLM engines over transferd: tokens, and hand-overs beside vLLM's own NIXL connector's.

A hand-over is from the end of the prefiller's last layer to the beginning of the decoder's first
one. NIXL's connector has the decoder asked once the prefiller has answered; ours has both asked at
once, as it is meant to be used, and is measured in NIXL's order as well.
"""

from __future__ import annotations

import contextlib
import math
import random
import statistics
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from bench.pair import daemons
from bench.report import Row
from bench.stats import spread
from transferd.client.demo.daemons import free_port

from support import engines
from support.engines import CALM_S, PREFILL, Engine, prompt, remote_prefill, transferd_engine

if TYPE_CHECKING:
    from collections.abc import Iterator

    from bench.topic import Run

PROMPTS, TOKENS, ROUNDS = 200, 8, 20
AT_ONCE = 16
LARGE, SMALL = 4096, 30  # tokens: 128 blocks, and a part of one
LARGE_BAR, SMALL_BAR = 0.5, 0.8
CHUNK = 1024  # tokens of a pass
ARGUMENTS = {"max_model_len": 8000, "max_num_batched_tokens": CHUNK}
PROBE = engines.ROOT / "tests" / "vllm" / "probe"
NIXL = {"kv_connector": "NixlConnector", "kv_role": "kv_both", "kv_buffer_device": "cpu"}


class Engines(NamedTuple):
    """A prefiller and a decoder, and what their layers note."""

    prefill: Engine
    decode: Engine
    notes: tuple[Path, Path]
    address: str  # of transferd's prefiller
    counter: str  # metric of the decoder: caches that have come

    def at_once(self, asked: list[int], number: str) -> float | None:
        """Has both asked at once; returns the hand-over's milliseconds; None: it has failed."""
        before = self._begin()
        waiting = self.decode.begin(asked, 2, remote_prefill(self.address, number))
        self.prefill.generate(asked, 1, {**PREFILL, "transfer_id": number})
        self.decode.end(waiting)
        return self._took(asked, before)

    def after(self, asked: list[int]) -> float | None:
        """Has the decoder asked once the prefiller has answered."""
        before = self._begin()
        answer = self.prefill.generate(asked, 1, {**PREFILL, "do_remote_prefill": False})
        self.decode.generate(asked, 2, answer.kv)
        return self._took(asked, before)

    def came(self) -> float:
        """Counts the caches that have come to the decoder."""
        return self.decode.metrics().get(self.counter, 0.0)

    def _begin(self) -> float:
        for file in self.notes:
            file.write_bytes(b"")
        return self.came()

    def _took(self, asked: list[int], before: float) -> float | None:
        passes = math.ceil(len(asked) / CHUNK)
        first = noted(self.notes[1], "first")
        if not first or self.came() != before + 1:  # it has failed, or was computed by the decoder
            return None
        return (first[0] - noted(self.notes[0], "last")[passes - 1]) * 1e3


def noted(file: Path, what: str) -> list[float]:
    """Reads the times of one kind."""
    lines = [line.split() for line in file.read_text().splitlines()]
    return [float(at) for kind, at in lines if kind == what]


def rows(run: Run) -> list[Row]:
    """Starts two pairs of engines and measures them in turn."""
    why = engines.why_not()
    if why:
        run.skip("vLLM's engines over transferd", why)
        return []
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="tfd-")))
        engines.make_models()
        ours = stack.enter_context(over_transferd(folder))
        found = [tokens_row(run, ours)]
        theirs = stack.enter_context(over_nixl(folder))
        return found + handed_rows(run, ours, theirs)


@contextlib.contextmanager
def pair(folder: Path, name: str, each: list[dict[str, Any]], counter: str) -> Iterator[Engines]:
    """Runs two engines with a probe in their connector."""
    with contextlib.ExitStack() as stack:
        made, notes = [], []
        for role, arguments in zip(("prefill", "decode"), each, strict=True):
            note = folder / f"{name}-{role}.notes"
            environment = {"PYTHONPATH": str(PROBE), "KV_PROBE": str(note)}
            arguments["environment"] = {**arguments.get("environment", {}), **environment}
            arguments["connector"]["kv_connector_module_path"] = "kv_probe"
            engine = Engine(folder, f"{name}-{role}", **arguments, arguments=dict(ARGUMENTS))
            stack.callback(engine.kill)
            made.append(engine.spawn())
            notes.append(note)
        prefill, decode = (engine.ready() for engine in made)
        file = folder / f"{name}.address"
        address = file.read_text() if file.exists() else ""
        yield Engines(prefill, decode, (notes[0], notes[1]), address, counter)


@contextlib.contextmanager
def over_transferd(folder: Path) -> Iterator[Engines]:
    """Runs a pair with two daemons."""
    with daemons(2, provider="tcp") as (near, far):
        file = str(folder / "transferd.address")
        each = [
            transferd_engine(near, address_file=file, timeout_s=CALM_S),
            transferd_engine(far, timeout_s=CALM_S),
        ]
        with pair(folder, "transferd", each, "vllm:transferd_seconds_count") as made:
            yield made


@contextlib.contextmanager
def over_nixl(folder: Path) -> Iterator[Engines]:
    """Runs a pair with vLLM's own connector."""
    each = [
        {
            "connector": dict(NIXL),
            "environment": {"VLLM_NIXL_SIDE_CHANNEL_PORT": str(free_port())},
        }
        for _ in range(2)
    ]
    with pair(folder, "nixl", each, "vllm:nixl_xfer_time_seconds_count") as made:
        yield made


def tokens_row(run: Run, ours: Engines) -> Row:
    """Compares answers with those of the prefiller by itself."""
    mixed = random.Random(8)
    count = run.scaled(PROMPTS)
    asked = [prompt(mixed.randint(1, 1500), 1000 + seed) for seed in range(count)]
    alone = [ours.prefill.generate(one, TOKENS).tokens for one in asked]
    equal = 0
    for first in range(0, count, AT_ONCE):
        part = range(first, min(count, first + AT_ONCE))
        waiting = [
            ours.decode.begin(asked[i], TOKENS, remote_prefill(ours.address, f"tokens {i}"))
            for i in part
        ]
        for i in part:
            ours.prefill.begin(asked[i], 1, {**PREFILL, "transfer_id": f"tokens {i}"})
        for i, number in zip(part, waiting, strict=True):
            equal += ours.decode.end(number).tokens == alone[i]
    received = ours.came()
    text = f"{received:.0f} came from the prefiller, {AT_ONCE} at once"
    told = min(equal, received)  # one that the decoder has computed says nothing
    return Row(f"answers of {count} prompts equal to one engine's", told, "", ">=", count, text)


def handed_rows(run: Run, ours: Engines, theirs: Engines) -> list[Row]:
    """Measures hand-overs in turn."""
    found = []
    for tokens, bar in ((LARGE, LARGE_BAR), (SMALL, SMALL_BAR)):
        taken: dict[str, list[float | None]] = {}
        run.gate.wait()
        for turn in range(run.scaled(ROUNDS) + 1):
            asked, number = prompt(tokens, 5000 + turn), f"{tokens}-{turn}"
            one = {
                "ours": ours.at_once(asked, number),
                "ours, one after the other": ours.after(asked),
                "NixlConnector": theirs.after(asked),
            }
            if turn:  # the first makes connections
                for name, ms in one.items():
                    taken.setdefault(name, []).append(ms)
        mine, its = (good(taken[name]) for name in ("ours", "NixlConnector"))
        ratio = statistics.median(mine) / statistics.median(its)
        text = f"{spread(mine, 1)} ms, its {spread(its, 1)}"
        bar_name = f"hand-over of {tokens} tokens, of NixlConnector's"
        found.append(Row(bar_name, ratio, "x", "<=", bar, text))
        for name, all_ms in taken.items():
            some = good(all_ms)
            text = spread(some, 1) if some else "none"
            if len(some) < len(all_ms):
                text += f", {len(all_ms) - len(some)} failed"
            run.beside(f"hand-over of {tokens} tokens, ms: {name}", text)
    return found


def good(taken: list[float | None]) -> list[float]:
    """Leaves out what has failed."""
    return [ms for ms in taken if ms is not None]
