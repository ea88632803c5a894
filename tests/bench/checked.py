# SPDX-License-Identifier: Apache-2.0
"""A client process whose transfers are checked: every count, and a hash of every round's bytes.

As :mod:`bench.endpoint`, with more commands; run as ``python -m bench.checked SOCKET LENGTH``.
"""

from __future__ import annotations

import contextlib
import hashlib
import select
import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

import transferd
from bench.endpoint import WAIT_S, Endpoint, commands, serve
from transferd.native.names import JobStatus

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from transferd import Client, Job

FIRST_IMM = 8  # those below are of other commands
ROUND_S = 120.0


@dataclass(frozen=True, slots=True)
class Round:
    """One round: writes, each with an immediate of its own, and one paged write that counts pages.

    Attributes:
        seed: Of its bytes and of the order of its pages.
        writes: How many.
        size: Bytes of each.
        pages: How many, after the writes.
        page: Bytes of each.
    """

    seed: int
    writes: int
    size: int
    pages: int
    page: int

    @property
    def pages_at(self) -> int:
        """Where the pages begin."""
        return self.writes * self.size

    def content(self) -> NDArray[np.uint8]:
        """The bytes of the source."""
        length = self.pages_at + self.pages * self.page
        return np.random.default_rng(self.seed).integers(0, 256, length, dtype=np.uint8)

    def order(self) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """Numbers of the pages, at the source and at the destination."""
        random = np.random.default_rng(self.seed + 1)
        return (
            random.permutation(self.pages).astype(np.int32),
            random.permutation(self.pages).astype(np.int32),
        )

    def expected(self) -> NDArray[np.uint8]:
        """The bytes of the destination afterwards."""
        content = self.content()
        shape = (self.pages, self.page)
        source = content[self.pages_at :].reshape(shape)
        result = content.copy()
        here, there = self.order()
        result[self.pages_at :].reshape(shape)[there] = source[here]
        return result

    def counts(self) -> dict[int, int]:
        """How much each immediate counts."""
        each = {FIRST_IMM + number: 1 for number in range(self.writes)}
        return {**each, FIRST_IMM + self.writes: self.pages}


class Checked(Endpoint):
    """An endpoint whose transfers are checked."""

    def __init__(self, client: Client, length: int) -> None:
        super().__init__(client, length)
        self._expected: dict[int, int] = {}
        self._faults: dict[int, int] = {}  # that are acknowledged

    def send_round(self, **what: int) -> dict[str, Any]:
        """Submits a round at once and waits for its jobs; tells how those ended that failed."""
        this = Round(**what)
        content = this.content()
        self._source.view[: len(content)] = content.tobytes()
        jobs: list[Job] = []
        for number in range(this.writes):
            begin, imm = number * this.size, FIRST_IMM + number
            source = self._source[begin : begin + this.size]
            jobs.append(self._client.write(source, self._far, begin, imm=imm))
        here, there = this.order()
        jobs.append(
            self._client.write_pages(
                self._source[this.pages_at : len(content)],
                here,
                self._far,
                there,
                this.page,
                dst_offset=this.pages_at,
                imm=FIRST_IMM + this.writes,
                count="page",
            )
        )
        return {"failed": [end for job in jobs if (end := failure(job)) is not None]}

    def check_round(self, **what: int) -> dict[str, Any]:
        """Waits for a round of the other side; tells which counts and hashes are wrong."""
        this = Round(**what)
        for imm, count in this.counts().items():
            self._expected[imm] = self._expected.get(imm, 0) + count
            self._client.counter(imm).wait(self._expected[imm], ROUND_S)
        wrong = self.counts_wrong()["wrong"]
        expected = this.expected()
        found = bytes(self._region.view[: len(expected)])
        if hashlib.sha256(found).digest() != hashlib.sha256(expected.tobytes()).digest():
            wrong.append(f"hash of round {this.seed}")
        return {"wrong": wrong}

    def counts_wrong(self) -> dict[str, Any]:
        """Tells which counters show anything but the exact number of all rounds."""
        wrong = []
        for imm, expected in self._expected.items():
            view = self._client.counter(imm).read()
            if (view.value, view.faults) != (expected, self._faults.get(imm, 0)):
                wrong.append(f"immediate {imm}: {view} and not {expected}")
        return {"wrong": wrong}

    def acknowledge(self) -> dict[str, Any]:
        """Takes the faults of all rounds' counters so far as seen."""
        for imm in self._expected:
            counter = self._client.counter(imm)
            counter.acknowledge()
            self._faults[imm] = counter.faults
        return {}

    def load(self, size: int, window: int, imm: int, seconds: float = 0.0) -> dict[str, Any]:
        """Writes for a time (0: until the next command has come), or until a job fails."""
        flying: list[Job] = []
        jobs, ended = 0, None
        end = time.monotonic() + seconds

        def goes_on() -> bool:
            if seconds:
                return time.monotonic() < end
            return not select.select([sys.stdin], [], [], 0)[0]

        while ended is None and goes_on():
            slot = jobs % window
            if len(flying) == window:
                ended = failure(flying.pop(0))
            source = self._source[slot * size : (slot + 1) * size]
            try:
                flying.append(self._client.write(source, self._far, slot * size, imm=imm))
            except transferd.TransferdError as error:
                ended = ended or type(error).__name__
            jobs += 1
        rest = [failure(job) for job in flying]
        failed = [status for status in [ended, *rest] if status is not None]
        return {"jobs": jobs, "failed": failed}

    def await_fault(self, imm: int, timeout_s: float) -> dict[str, Any]:
        """Waits for more than ever comes; tells what ended that."""
        try:
            self._client.counter(imm).wait(1 << 40, timeout_s)
        except transferd.TransferdError as error:
            return {"ended": type(error).__name__}
        return {"ended": ""}

    def counter(self, imm: int, awaited: int = 0) -> dict[str, Any]:
        """Reads a counter, once it has the value or does not reach it.

        A write has succeeded when the far device has acknowledged it; the daemon there counts it
        when it next looks.
        """
        with contextlib.suppress(transferd.TransferdError):
            self._client.counter(imm).wait(awaited, ROUND_S)
        view = self._client.counter(imm).read()
        return {"value": view.value, "faults": view.faults, "lost": view.lost}


def failure(job: Job) -> str | None:
    """Waits for a job; tells how it ended if it has failed."""
    try:
        job.wait(WAIT_S)
    except transferd.JobFailed as error:
        return f"{JobStatus(error.status).name} {error.detail}"
    return None


def main() -> None:
    """Runs one."""
    address, length = sys.argv[1], int(sys.argv[2])
    with transferd.Client(address, name="bench checked") as client:
        checked = Checked(client, length)
        serve(
            checked,
            {
                **commands(checked),
                "send_round": checked.send_round,
                "check_round": checked.check_round,
                "counts_wrong": checked.counts_wrong,
                "acknowledge": checked.acknowledge,
                "load": checked.load,
                "stop": dict,  # what ends a load
                "await_fault": checked.await_fault,
                "counter": checked.counter,
            },
        )


if __name__ == "__main__":
    main()
