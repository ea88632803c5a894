# SPDX-License-Identifier: Apache-2.0
"""A worker's half of the connector: one rank's Prefiller, Decoder and cache.

What fails here fails a request and not the engine: a decoder computes it itself, a prefiller lets
its blocks go. Nothing of vLLM is imported.
"""

from __future__ import annotations

import contextlib
import logging
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from transferd.client.errors import TransferdError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transferd.kv.vllm.layouts import Caches
    from transferd.kv.vllm.stats import Stats
    from transferd.kv.vllm.work import Progress, Receive, Work

logger = logging.getLogger(__name__)

# A preempted request's blocks are written to by the step that is about to begin. Until then its
# pushes have ended: the daemon cancels them in milliseconds, and answers even if its peer is gone.
PREEMPT_S = 10.0


@dataclass(slots=True)
class Results:
    """What has ended since the last look, by vLLM's request id.

    Attributes:
        sent: Their blocks are free.
        received: They are here, or failed.
        failed: Of those, the ones that failed.
        blocks: Of those that failed, what would have come (of the first group).
    """

    sent: set[str] = field(default_factory=set)
    received: set[str] = field(default_factory=set)
    failed: set[str] = field(default_factory=set)
    blocks: set[int] = field(default_factory=set)


@dataclass(slots=True)
class Arriving:
    """A transfer to this rank.

    Attributes:
        receive: What was asked for.
        transfer: Its handle; None: it could not be asked for.
        began: Monotonic time.
    """

    receive: Receive
    transfer: Any
    began: float


class WorkerSide:
    """The transfers of one rank.

    Args:
        caches: Of this rank.
        prefiller: None: this engine is none.
        decoder: None: this engine is none.
        stats: Counts.
    """

    def __init__(self, caches: Caches, prefiller: Any, decoder: Any, stats: Stats) -> None:
        self.caches = caches
        self.prefiller = prefiller
        self.decoder = decoder
        self.stats = stats
        self._order = {name: number for number, name in enumerate(caches.layers)}
        self._arriving: dict[str, Arriving] = {}
        self._names: dict[int, str] = {}  # of transfers, by their handle's identity
        self._leaving: dict[str, bytes] = {}  # transfer ids of prefills that are not released
        self._tables: dict[str, dict[str, list[int]]] = {}  # of those that are computed
        self._requests: dict[bytes, str] = {}
        self._reported: set[str] = set()  # of those, the ones that vLLM waits for
        self._lost: set[str] = set()  # prefills that failed here
        self._on_device = any(str(t.device) != "cpu" for t in caches.storages.values())
        self._step: Any = None
        self._stepping: tuple[str, ...] = ()
        self._done = 0
        self._kept = Results()

    def renew(self, prefiller: Any, decoder: Any) -> None:
        """Goes on with ranks of a new session, between two steps: all of the old one has ended."""
        self._kept = self.results()
        self.prefiller = prefiller
        self.decoder = decoder

    # ---- a step ----

    def preempt(self, work: Work) -> None:
        """Has nobody read the blocks of requests that lose them. Idempotent."""
        for name in work.preempted:
            self._preempt(name)

    def begin(self, work: Work) -> None:
        """Does what comes before the forward: nothing of it waits for a peer."""
        for name, progress in work.compute.items():
            self._compute(name, progress)
        for name in work.finished:
            self._finish(name)
        for name in work.aborted:
            self._abort(name)
        computed = {
            progress.transfer_id: progress.tokens
            for name, progress in work.compute.items()
            if name in self._leaving and name not in self._lost
        }
        if computed:
            self._stepping, self._done = tuple(work.compute), 0
            with self._failing("a step", *self._stepping):
                step = self.prefiller.step(computed, device=self._on_device)
                step.__enter__()
                self._step = step

    def layer_done(self, name: str, stream: Any = None) -> None:
        """A layer's keys and values are written; or will be, by what is in the stream."""
        number = self._order.get(name)
        if self._step is None or number is None:
            return
        with self._failing("a layer", *self._stepping):
            try:
                while self._done <= number:
                    self._done += 1
                    if stream is None:
                        self._step.layer_done()
                    else:
                        self._step.watcher.cuda_bump(stream)
            except TransferdError as error:  # the watcher lags behind: the next step has a new one
                step, self._step = self._step, None
                step.__exit__(type(error), error, error.__traceback__)
                raise

    def end(self, stream: Any = None) -> None:
        """The forward is through: so are all layers, those that no hook has told of as well."""
        if self._step is None:
            return
        self.layer_done(self.caches.layers[-1], stream)
        step, self._step = self._step, None
        with self._failing("a step", *self._stepping):
            step.__exit__(None, None, None)

    # ---- prefiller ----

    @contextlib.contextmanager
    def _failing(self, what: str, *names: str) -> Iterator[None]:
        """Has errors of the SDK end these requests alone."""
        try:
            yield
        except TransferdError as error:
            logger.error("transferd: %s of %s failed: %s", what, ", ".join(names), error)
            for name in names:
                self._lose(name)

    def _lose(self, name: str) -> None:
        """Gives a prefill up. Its blocks are read until the prefiller has released it."""
        if name in self._leaving:
            self._lost.add(name)
            with contextlib.suppress(TransferdError):
                self.prefiller.abort(self._leaving[name])

    def _compute(self, name: str, progress: Progress) -> None:
        number = progress.transfer_id
        if name in self._lost:
            return
        pages = self.caches.pages(progress.blocks) if any(progress.blocks) else {}
        if name in self._leaving:
            table = self._tables[name]
            for group, more in pages.items():
                table[group].extend(more)
            if pages:
                with self._failing("the prefill", name):
                    self.prefiller.extend(number, table)
            return
        try:
            self.prefiller.begin(number, pages, progress.prompt)
        except TransferdError as error:  # another one has this id, say
            logger.error("transferd: the prefill of %s is for no decoder: %s", name, error)
            self._lost.add(name)
            return
        self._leaving[name] = number
        self._requests[number] = name
        self._tables[name] = pages

    def _finish(self, name: str) -> None:
        self._reported.add(name)
        if name in self._leaving:
            with self._failing("the end", name):
                self.prefiller.finish(self._leaving[name])

    def _abort(self, name: str) -> None:
        self._reported.add(name)
        if name in self._leaving:
            with self._failing("the abort", name):
                self.prefiller.abort(self._leaving[name])

    def _preempt(self, name: str) -> None:
        """Ends the pushes of a request, and waits until none of them reads any more."""
        if name not in self._leaving:
            self._lost.discard(name)
            return
        with self._failing("the abort", name):
            self.prefiller.abort(self._leaving[name])
        deadline = time.monotonic() + PREEMPT_S
        while name in self._leaving:
            left = deadline - time.monotonic()
            if left <= 0:
                raise RuntimeError(
                    f"the transfer of {name}, which is preempted, has not ended in {PREEMPT_S} s: "
                    "its blocks cannot be given away"
                )
            for number, why in self.prefiller.released(left):
                self._released(number, why)
        self._lost.discard(name)  # it is computed anew, from its first token on

    def _released(self, number: bytes, why: str) -> None:
        name = self._requests.pop(number, None)
        if name is not None:
            self._leaving.pop(name, None)
            self._tables.pop(name, None)
            if name not in self._reported:  # what is computed of it later is of no use to anybody
                self._lost.add(name)
            self.stats.sent(why)

    # ---- decoder ----

    def ask(self, work: Work) -> None:
        """Asks for what is to come; returns at once."""
        for name, receive in work.receive.items():
            transfer = None
            try:
                transfer = self.decoder.request(
                    receive.transfer_id,
                    receive.address,
                    pages=self.caches.pages(receive.blocks),
                    tokens=receive.tokens,
                    first_token=receive.first_token,
                    deadline_s=receive.deadline_s,
                )
            except TransferdError as error:
                logger.error("transferd: request %s is computed here: %s", name, error)
                self._decline(receive.transfer_id, receive.address)
            else:
                self._names[id(transfer)] = name
            self._arriving[name] = Arriving(receive, transfer, time.monotonic())
        for name in work.cancel:
            arriving = self._arriving.get(name)
            if arriving is not None and arriving.transfer is not None:
                arriving.transfer.cancel()
        for transfer_id, address in work.declined:
            self._decline(transfer_id, address)

    def _decline(self, transfer_id: bytes, address: bytes) -> None:
        """Has a prefiller hear that nobody here will read what it holds."""
        try:
            self.decoder.decline(transfer_id, address)
        except TransferdError as error:
            logger.warning("transferd: a prefiller keeps blocks until its lease is over: %s", error)

    def results(self) -> Results:
        """Tells what has ended; never waits."""
        found, self._kept = self._kept, Results()
        if self.decoder is not None:
            for name in [n for n, one in self._arriving.items() if one.transfer is None]:
                self._arrived(name, found)
            for transfer in self.decoder.poll():
                known = self._names.get(id(transfer))
                if known is not None:
                    self._arrived(known, found)
        if self.prefiller is not None:
            for number, why in self.prefiller.poll():
                self._released(number, why)
            for name in [n for n in self._reported if n not in self._leaving]:
                self._reported.remove(name)
                self._lost.discard(name)
                found.sent.add(name)
        return found

    def _arrived(self, name: str, found: Results) -> None:
        arriving = self._arriving.pop(name)
        transfer, receive = arriving.transfer, arriving.receive
        self._names.pop(id(transfer), None)
        found.received.add(name)
        outcome = "refused" if transfer is None else str(transfer.outcome.value)
        seconds = time.monotonic() - arriving.began
        tokens = receive.tokens - receive.first_token
        self.stats.received(outcome, tokens, seconds)
        if outcome == "complete":
            return
        if outcome != "cancelled":
            detail = "" if transfer is None else transfer.detail
            logger.warning("transferd: request %s did not come: %s %s", name, outcome, detail)
        found.failed.add(name)
        found.blocks.update(self._missing(receive))

    def _missing(self, receive: Receive) -> list[int]:
        """Finds the blocks that should have come; those before are of this engine's own cache."""
        group = self.caches.groups[0]
        page = self.caches.layout.groups[0].page_tokens * self.caches.ratios[0]
        return receive.blocks[group][receive.first_token // page :]
