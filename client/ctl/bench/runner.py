# SPDX-License-Identifier: Apache-2.0
"""The initiator of a benchmark: has its workers do the steps of a sweep, and makes rows of them."""

from __future__ import annotations

import contextlib
import platform
import statistics
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, NamedTuple

import transferd
from transferd.client import errors
from transferd.client.child import Child
from transferd.client.ctl import render
from transferd.client.ctl.bench import messages
from transferd.client.ctl.bench.link import PROTOCOL, Link, checked
from transferd.client.ctl.bench.report import Path, Row, jain, spread

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from transferd.client.ctl.bench.machine import Machine
    from transferd.client.ctl.bench.sweep import Settings, Step

WORKER = "transferd.client.ctl.bench.worker"
ALIVE_S = 3.0
NO_RING = (
    "jobs were submitted by gRPC, at a call each: these sessions have no shared memory with their "
    "daemon"
)


class Flood(NamedTuple):
    """A rate phase of all workers; ``each`` is in batches a second."""

    batches: int
    seconds: float
    each: list[float]

    @property
    def rate(self) -> float:
        """Batches a second of all."""
        return self.batches / self.seconds


class Workers:
    """The processes of a scheme; a context manager that ends them.

    Attributes:
        shared_memory: Whether they submit through it.
    """

    def __init__(self, address: str, count: int, settings: Settings) -> None:
        """Starts them, each with a session of its own.

        Raises:
            TransferdError: One could not attach.
        """
        self._stack = contextlib.ExitStack()
        self._children: list[Child] = []
        try:
            for index in range(count):
                child = Child(WORKER, address, str(index), own_group=True)
                self._children.append(self._stack.enter_context(child))
            self.shared_memory = all(told["shared_memory"] for told in self._read())
            self.ask("settings", [asdict(settings)] * count)
        except BaseException as error:
            self._stack.__exit__(type(error), error, error.__traceback__)
            raise

    def __len__(self) -> int:
        return len(self._children)

    def ask(self, do: str, each: Sequence[dict[str, Any]] | None = None) -> list[dict[str, Any]]:
        """Asks all at once; waits for all.

        Raises:
            TransferdError: What one of them says.
        """
        for child, values in zip(self._children, each or [{}] * len(self), strict=True):
            child.tell(do=do, **values)
        return self._read()

    def _read(self) -> list[dict[str, Any]]:
        answers = [child.read() for child in self._children]  # all, or the next ask gets the rest
        return [checked(answer, f"initiator {i}") for i, answer in enumerate(answers)]

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)


class Runner:
    """A run against one target; a context manager.

    Attributes:
        target: What the target runs on.
        notes: What a reader of the figures has to know.
        on_step: Told each step as it begins.
    """

    def __init__(
        self,
        address: str,
        target: bytes,
        settings: Settings,
        on_step: Callable[[Step], object] = lambda _: None,
    ) -> None:
        """Introduces itself to the target.

        Raises:
            TransferdError: The daemon, or the target, does not answer, or refuses.
        """
        self.notes: list[str] = []
        self.on_step = on_step
        self._address = address
        self._settings = settings
        self._client = transferd.Client(address, name="bench")
        self._link: Link | None = None
        try:
            self._link = Link(self._client, target)
            self.target = self._greet(self._link)
        except BaseException:
            self.close()
            raise

    def _greet(self, link: Link) -> Machine:
        return link.ask(
            "hello",
            messages.Greeted,
            protocol=PROTOCOL,
            version=transferd.__version__,
            host=platform.node(),
            reply_to=link.reply_to,
        ).machine

    def rows(self, steps: Sequence[Step]) -> Iterator[Row]:
        """Does the steps, which are ordered by their schemes, and yields a row for each.

        A step whose memory a limit refuses ends the larger ones of its scheme, with a note.
        """
        link = self._checked_link
        for (scheme, count), chosen in _by_scheme(steps):
            link.ask("sessions", messages.Reply, scheme=scheme, initiators=count)
            with Workers(self._address, count, self._settings) as workers:
                if not workers.shared_memory and NO_RING not in self.notes:
                    self.notes.append(NO_RING)
                refused = 0
                for step in chosen:
                    if refused and step.length >= refused:
                        continue
                    self.on_step(step)
                    try:
                        row = self._step(step, workers)
                    except errors.QuotaExceeded as error:
                        refused = step.length
                        self.notes.append(
                            f"left out from {render.bytes_text(step.length)} for each of "
                            f"{count} initiators on: {error}"
                        )
                        workers.ask("release")
                        link.ask("close", messages.Reply)
                    except errors.TransferdError:
                        link.ask(
                            "ping", messages.Reply, timeout_s=ALIVE_S
                        )  # that it has died says more
                        raise
                    else:
                        yield row

    def _step(self, step: Step, workers: Workers) -> Row:
        link = self._checked_link
        opened = link.ask(
            "open",
            messages.Opened,
            timeout_s=None,
            step=step.number,
            operation=step.operation,
            length=step.length,
            seed=self._settings.seed,
        )
        places = self._places(step.initiators)
        prepared = workers.ask("prepare", [{"step": step.plain(), **place} for place in places])
        text = step_text(step)
        link.ask("ready", messages.Together, timeout_s=None, step=text)
        workers.ask("warm_up")
        samples = workers.ask("latency")
        floods = []
        for _ in range(self._settings.repeats):
            link.ask("ready", messages.Together, timeout_s=None, step=text)
            floods.append(_flood(workers.ask("rate")))
        finished = workers.ask("finish")
        compared = self._verify(step, finished)
        workers.ask("release")
        link.ask("close", messages.Reply)
        row = _row(step, self._settings, samples, floods, finished, prepared, opened, compared)
        together = link.ask(
            "done",
            messages.Together,
            timeout_s=None,
            step=text,
            gbit_per_s=row.gbit_per_s,
            operations_per_s=row.operations_per_s,
        )
        return row.model_copy(
            update={
                "hosts": together.hosts,
                "all_gbit_per_s": together.gbit_per_s,
                "all_operations_per_s": together.operations_per_s,
            }
        )

    def _places(self, count: int) -> list[dict[str, Any]]:
        places: list[messages.Where] = []
        while len(places) < count:
            answer = self._checked_link.ask("places", messages.Placed, first=len(places))
            places += answer.places
        return [place.model_dump() for place in places[:count]]

    def _verify(self, step: Step, finished: Sequence[dict[str, Any]]) -> int:
        """Has all that was moved compared; returns the bytes.

        Raises:
            Internal: Something is not as it ought to be.
        """
        reading = step.operation == "read"
        for i, each in enumerate(finished):
            _check_difference(step, i, each["difference"], "what was read")
        lengths = [each["length"] for each in finished]
        answer = self._checked_link.ask(
            "verify",
            messages.Verified,
            timeout_s=None,
            lengths=[0] * len(finished) if reading else lengths,
            counts=[0 if reading else each["batches"] * step.batch for each in finished],
        )
        _check_difference(step, answer.initiator, answer.difference, "the target's memory")
        return sum(lengths)

    @property
    def _checked_link(self) -> Link:
        assert self._link is not None
        return self._link

    def close(self) -> None:
        """Leaves the target, ends the session. Idempotent."""
        if self._link is not None:
            self._link.close()
            self._link = None
        self._client.close()

    def __enter__(self) -> Runner:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def step_text(step: Step) -> str:
    """Says a step in a few words."""
    size = f" of {render.bytes_text(step.size)}" if step.size else ""
    many = f" x {step.batch:,}" if step.batch > 1 else ""
    who = f", {step.initiators} {step.scheme}" if step.initiators > 1 else ""
    return f"{step.operation}{size}{many}{who}"


def _by_scheme(steps: Sequence[Step]) -> Iterator[tuple[tuple[str, int], list[Step]]]:
    schemes = dict.fromkeys((step.scheme, step.initiators) for step in steps)
    for scheme, count in schemes:
        yield (
            (scheme, count),
            [step for step in steps if (step.scheme, step.initiators) == (scheme, count)],
        )


def _check_difference(step: Step, i: int, difference: Any, where: str) -> None:
    if difference is None:
        return
    at, found, expected = difference
    raise errors.Internal(
        f"WRONG DATA: {step.operation} of {render.bytes_text(step.size)}: byte {at:,} of "
        f"initiator {i} in {where} is {found:#04x}, not {expected:#04x} (operation "
        f"{at // step.size % step.batch} of batch {at // step.slot_bytes})",
        reason="BENCH_DATA",
    )


def _flood(answers: Sequence[dict[str, Any]]) -> Flood:
    begun = min(answer["begun_ns"] for answer in answers)
    ended = max(answer["ended_ns"] for answer in answers)
    return Flood(
        batches=sum(answer["batches"] for answer in answers),
        seconds=(ended - begun) / 1e9,
        each=[a["batches"] / (a["ended_ns"] - a["begun_ns"]) * 1e9 for a in answers],
    )


def _row(
    step: Step,
    settings: Settings,
    samples: Sequence[dict[str, Any]],
    floods: Sequence[Flood],
    finished: Sequence[dict[str, Any]],
    prepared: Sequence[dict[str, Any]],
    opened: messages.Opened,
    compared: int,
) -> Row:
    flood = sorted(floods, key=lambda each: each.rate)[(len(floods) - 1) // 2]
    prep, post, transfer = (
        [time for each in samples for time in each[name]] for name in ("prep", "post", "transfer")
    )
    paths = {Path.model_validate(path) for each in finished for path in each["paths"]}
    bytes_per_s = flood.rate * step.slot_bytes
    operations_per_s = flood.rate * step.batch
    return Row(
        operation=step.operation,
        size_bytes=step.size,
        batch=step.batch,
        scheme=step.scheme,
        initiators=step.initiators,
        in_flight=settings.in_flight,
        slots=step.slots,
        shape=step.shape,
        shape_pages=step.shape_pages,
        batches=flood.batches,
        seconds=flood.seconds,
        gbit_per_s=bytes_per_s * 8 / 1e9,
        gbyte_per_s=bytes_per_s / 1e9,
        operations_per_s=operations_per_s,
        hosts=1,
        all_gbit_per_s=bytes_per_s * 8 / 1e9,
        all_operations_per_s=operations_per_s,
        each_operations_per_s=[rate * step.batch for rate in flood.each],
        jain=jain(flood.each),
        repeats_gbit_per_s=[each.rate * step.slot_bytes * 8 / 1e9 for each in floods],
        latency_us=spread([a + b for a, b in zip(post, transfer, strict=True)]),
        prep_us=spread(prep),
        post_us=spread(post),
        transfer_us=spread(transfer),
        register_ms=max(each["register_ms"] for each in prepared),
        target_register_ms=opened.register_ms,
        open_ms=statistics.median(each["open_ms"] for each in prepared),
        paths=sorted(paths, key=str),
        batches_in_all=sum(each["batches"] for each in finished),
        compared_bytes=compared,
    )
