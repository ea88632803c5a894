# SPDX-License-Identifier: Apache-2.0
"""The target of a benchmark: lends memory to initiators, and says what has landed in it."""

from __future__ import annotations

import base64
import contextlib
import json
import time
from typing import TYPE_CHECKING, Any

import pydantic

import transferd
from transferd.client import errors
from transferd.client.ctl import render
from transferd.client.ctl.bench import messages
from transferd.client.ctl.bench.link import (
    SLOT_BYTES,
    SLOTS,
    check_protocol,
    failed,
)
from transferd.client.ctl.bench.machine import Machine, machine
from transferd.client.ctl.bench.pattern import Pattern
from transferd.client.ctl.bench.report import jain
from transferd.client.ctl.bench.sweep import MANY_TO_ONE, MEMORY_SHARE, memory_available

if TYPE_CHECKING:
    from collections.abc import Callable

    from transferd import Client, Grant, Job, Region

LOOK_S = 0.5
PLACES = 12  # of one answer
COUNT_S = 10.0  # counts follow the sender's acknowledgement by much less
GUESTS_MAX = 64
NO_MESSAGE = (ValueError, KeyError, TypeError, RecursionError)


class Guest:
    """An initiator, seen from the target.

    Attributes:
        name: As it calls itself.
        host: The same.
        regions: That it has, one for each session.
        before: What each initiator's counter was when they were opened.
        waits: Its message that is answered when all have sent theirs; None: there is none.
    """

    def __init__(self, address: str, client: Client, hello: messages.Hello) -> None:
        self.name = hello.guest
        self.host = hello.host
        self.waits: messages.Ready | messages.Done | None = None
        self._address = address
        self._client = client
        self._reply_to = hello.reply_to
        self._answer: Job | None = None
        self._many_to_one = False
        self._initiators = 0
        self._sessions: list[Client] = []
        self.regions: list[Region] = []
        self._grants: list[Grant] = []
        self.before: list[int] = []
        self._open: messages.Open | None = None

    # ---- what it asks for ----

    def sessions(self, asked: messages.Sessions) -> dict[str, Any]:
        """Opens the sessions of a scheme."""
        self.end_sessions()
        self._many_to_one = asked.scheme == MANY_TO_ONE
        self._initiators = asked.initiators
        for number in range(1 if self._many_to_one else asked.initiators):
            name = f"bench target {number}"
            self._sessions.append(transferd.Client(self._address, name=name))
        return {}

    def open(self, asked: messages.Open, memory: int) -> dict[str, Any]:
        """Registers memory for a step."""
        self.close()
        total = asked.length * self._initiators
        _check_memory(total, memory)
        begun = time.monotonic_ns()
        rights = {"read"} if asked.operation == "read" else {"write"}
        imms = range(self._initiators if self._many_to_one else 1)
        length = total if self._many_to_one else asked.length
        for session in self._sessions:
            region = session.alloc(length, name="bench")
            self.regions.append(region)
            self._grants.append(region.grant(rights=rights, imms=imms))
        ended = time.monotonic_ns()
        self._open = asked
        self.before = [self._counter(i).value for i in range(self._initiators)]
        if asked.operation == "read":
            for i in range(self._initiators):
                self._pattern(i).fill(self.part(i))
        return {"register_ms": (ended - begun) / 1e6}

    def places(self, asked: messages.Places) -> dict[str, Any]:
        """Tells where the initiators write to."""
        length = self._opened.length
        last = min(asked.first + PLACES, self._initiators)
        one = self._many_to_one
        return {
            "places": [
                {
                    "descriptor": base64.b64encode(
                        self._grants[0 if one else i].descriptor
                    ).decode(),
                    "base": i * length if one else 0,
                    "imm": i if one else 0,
                }
                for i in range(asked.first, last)
            ]
        }

    def verify(self, asked: messages.Verify) -> dict[str, Any]:
        """Compares counts and bytes with what the initiators say they have sent."""
        if not len(asked.lengths) == len(asked.counts) == self._initiators:
            raise errors.InvalidRequest(f"lengths and counts are {self._initiators} each")
        compared = 0
        for i, (length, count) in enumerate(zip(asked.lengths, asked.counts, strict=True)):
            self._verify_count(i, count)
            difference = self._pattern(i).difference(self.part(i)[:length])
            if difference is not None:
                return {"initiator": i, "difference": difference}
            compared += length
        return {"compared": compared}

    def _verify_count(self, i: int, count: int) -> None:
        counter = self._counter(i)
        with contextlib.suppress(errors.WaitTimeout):
            counter.wait(self.before[i] + count, COUNT_S)
        counted = counter.value - self.before[i]
        if counted != count:
            raise errors.Internal(
                f"{counted:,} operations of initiator {i} were counted, {count:,} were sent",
                reason="BENCH_COUNT",
            )

    # ---- its memory ----

    def part(self, i: int) -> memoryview:
        """The bytes that an initiator has."""
        length = self._opened.length
        if self._many_to_one:
            return self.regions[0].view[i * length : (i + 1) * length]
        return self.regions[i].view

    @property
    def _opened(self) -> messages.Open:
        if self._open is None:
            raise errors.Conflict("no memory is open", reason="BENCH_ORDER")
        return self._open

    def _counter(self, i: int) -> transferd.Counter:
        return self._sessions[0 if self._many_to_one else i].counter(i if self._many_to_one else 0)

    def _pattern(self, i: int) -> Pattern:
        return Pattern(self._opened.seed, self._opened.step, i)

    def close(self) -> None:
        """Gives the memory back. Idempotent."""
        for region in self.regions:
            region.close()
        self.regions.clear()
        self._grants.clear()
        self._open = None

    def end_sessions(self) -> None:
        """Ends its sessions. Idempotent."""
        with contextlib.suppress(errors.TransferdError):
            self.close()
        for session in self._sessions:
            session.close()
        self._sessions.clear()

    # ---- speaking to it ----

    def answer(self, number: int, values: dict[str, Any]) -> None:
        """Sends an answer; does not wait for it to be delivered."""
        self._answer = self._client.send(
            self._reply_to, json.dumps({"number": number, **values}).encode()
        )

    def is_gone(self) -> bool:
        """Tells whether it has died: a message to it tells. Called now and then."""
        try:
            if self._answer is not None:
                if not self._answer.done():
                    return False
                self._answer.wait(0)
            self.answer(0, {})
        except errors.TransferdError:
            return True
        return False


def _sum_text(done: list[messages.Done]) -> str:
    """Says the rates of a step."""
    if done[0].gbit_per_s:
        rates, unit = [each.gbit_per_s for each in done], "Gbit/s"
    else:
        rates, unit = [each.operations_per_s for each in done], "operations/s"
    each = " + ".join(f"{rate:,.2f}" for rate in rates)
    return f"{done[0].step}: {each} = {sum(rates):,.2f} {unit} (Jain index {jain(rates):.3f})"


def _check_memory(total: int, memory: int) -> None:
    """Refuses more than the target may lend, or than its host has.

    Raises:
        QuotaExceeded: It is more.
    """
    available = int(memory_available() * MEMORY_SHARE)
    if total > min(memory, available):
        raise errors.QuotaExceeded(
            f"{render.bytes_text(total)} are more than its "
            + (
                f"{render.bytes_text(memory)}: --memory of `transferctl bench --serve` sets that"
                if memory <= available
                else f"host can give, which is {render.bytes_text(available)}"
            ),
            reason="BENCH_MEMORY",
        )


class Target:
    """Serves initiators until its mailbox is closed; a context manager.

    Attributes:
        machine: What it runs on.
        on_event: Told a line for people when something happens.
    """

    def __init__(
        self,
        address: str,
        memory: int,
        *,
        expected: int = 1,
        once: bool = False,
        on_event: Callable[[str], object] = lambda _: None,
    ) -> None:
        """Attaches.

        Args:
            address: Of the daemon.
            memory: Bytes that an initiator may have at most, all its processes together.
            expected: Initiators that begin together.
            once: Whether to end after the last of them has left.
            on_event: See the class.
        """
        self.machine: Machine = machine(address)
        self.on_event = on_event
        self._address = address
        self._memory = memory
        self._expected = expected
        self._once = once
        self._left = 0
        self._client = transferd.Client(address, name="bench target")
        self._mailbox = self._client.mailbox(SLOTS, SLOT_BYTES)
        self.guests: dict[str, Guest] = {}

    @property
    def descriptor(self) -> bytes:
        """Of its mailbox; the token is made of it."""
        return self._mailbox.descriptor

    def serve(self) -> None:
        """Answers until :meth:`stop`, or all have left."""
        looked_s = time.monotonic()
        while not (self._once and self._left >= self._expected):
            try:
                data = self._mailbox.receive(LOOK_S)
            except errors.WaitTimeout:
                data = None
            except errors.Conflict:
                return  # stopped
            if data is not None:
                self._take(data)
            if time.monotonic() - looked_s > LOOK_S:
                self._look()
                looked_s = time.monotonic()

    def stop(self) -> None:
        """Has :meth:`serve` return, from any thread. Idempotent."""
        self._mailbox.close()

    def _take(self, data: bytes) -> None:
        try:
            asked = messages.parse(data)
        except pydantic.ValidationError as error:
            self._refuse(data, error)
            return
        if isinstance(asked, messages.Hello):
            self._greet(asked)
            return
        guest = self.guests.get(asked.guest)
        if guest is None:
            return
        if isinstance(asked, messages.Bye):
            self._drop(guest, "has left")
            return
        if isinstance(asked, messages.Ready | messages.Done):
            guest.waits = asked
            self._meet()
            return
        if asked.number:
            self._answer(guest, asked.number, lambda: self._act(guest, asked))

    def _act(self, guest: Guest, asked: Any) -> dict[str, Any]:
        match asked:
            case messages.Sessions():
                return guest.sessions(asked)
            case messages.Open():
                return guest.open(asked, self._memory)
            case messages.Places():
                return guest.places(asked)
            case messages.Verify():
                return guest.verify(asked)
            case messages.Close():
                guest.close()
        return {}

    def _answer(self, guest: Guest, number: int, act: Callable[[], dict[str, Any]]) -> None:
        try:
            values = act()
        except errors.TransferdError as error:
            values = failed(error)
        try:
            guest.answer(number, values)
        except errors.TransferdError as error:
            self._drop(guest, f"is gone: {error}")

    def _greet(self, hello: messages.Hello) -> None:
        guest = Guest(self._address, self._client, hello)

        def greet() -> dict[str, Any]:
            check_protocol(hello.protocol, f"the initiator (transferd {hello.version})")
            if len(self.guests) >= GUESTS_MAX:
                raise errors.QuotaExceeded(f"{GUESTS_MAX} initiators are here already")
            if not self.guests:
                self._left = 0
            self.guests[guest.name] = guest
            self.on_event(f"{guest.host} has come")
            return {"machine": self.machine.model_dump()}

        self._answer(guest, hello.number, greet)

    def _refuse(self, data: bytes, error: pydantic.ValidationError) -> None:
        """Tells an initiator that is known what is wrong with its message; others hear nothing."""
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"]))
        with contextlib.suppress(*NO_MESSAGE, errors.TransferdError):
            told = json.loads(data)
            wrong = errors.InvalidRequest(f"message {told['do']!r}: {where}: {first['msg']}")
            self.guests[told["guest"]].answer(int(told["number"]), failed(wrong))

    def _meet(self) -> None:
        """Answers those who wait for each other, once all of them do."""
        waiting = {guest: guest.waits for guest in self.guests.values() if guest.waits is not None}
        if not waiting or len(waiting) < self._expected - self._left:
            return
        for guest in waiting:
            guest.waits = None
        for guest, asked in waiting.items():
            self._answer(guest, asked.number, lambda: self._met(list(waiting.values())))
        done = [asked for asked in waiting.values() if isinstance(asked, messages.Done)]
        if len(done) > 1:
            self.on_event(_sum_text(done))

    def _met(self, asked: list[messages.Ready | messages.Done]) -> dict[str, Any]:
        steps = sorted({(each.do, each.step) for each in asked})
        if len(steps) > 1:
            raise errors.InvalidRequest(
                f"the initiators do not do the same: {'; '.join(' '.join(s) for s in steps)}; "
                "start all with the same options"
            )
        rates = [each for each in asked if isinstance(each, messages.Done)]
        return {
            "hosts": len(asked),
            "gbit_per_s": sum(each.gbit_per_s for each in rates),
            "operations_per_s": sum(each.operations_per_s for each in rates),
        }

    def _look(self) -> None:
        for guest in list(self.guests.values()):
            if guest.is_gone():
                self._drop(guest, "is gone")

    def _drop(self, guest: Guest, why: str) -> None:
        self.guests.pop(guest.name, None)
        guest.end_sessions()
        self._left += 1
        self.on_event(f"{guest.host} {why}")
        self._meet()

    def close(self) -> None:
        """Ends everything; the mailbox first, which tells the initiators why. Idempotent."""
        with contextlib.suppress(errors.TransferdError):
            self.stop()
        for guest in list(self.guests.values()):
            guest.end_sessions()
        self.guests.clear()
        self._client.close()

    def __enter__(self) -> Target:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
