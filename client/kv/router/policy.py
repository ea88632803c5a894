# SPDX-License-Identifier: Apache-2.0
"""Which engines serve a prompt: least loaded, with affinity to known prefixes. No I/O, no clock.

An engine's load is what it told last, and what was routed to it since. A prefiller that likely has
a prompt's beginning in its cache has that much less to compute, so that one number decides: tokens
until the prompt would be done.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import TYPE_CHECKING

from transferd.client import errors

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator, Sequence

PREFILLER = "prefiller"
DECODER = "decoder"
PREFIXES_MAX = 65_536  # pages that are remembered of each prefiller
HASH_BYTES = 8


def prefix_hashes(tokens: Sequence[int], page_tokens: int) -> list[int]:
    """Hashes the full pages of a prompt, each with all that is before it.

    Args:
        tokens: The prompt; numbers below 2^32.
        page_tokens: Tokens of a page.

    Returns:
        64-bit numbers: two prompts share one exactly when they begin alike up to there (but for one
        chance in 2^64).
    """
    running = blake2b(digest_size=HASH_BYTES)
    hashes = []
    for start in range(0, len(tokens) - page_tokens + 1, page_tokens):
        for token in tokens[start : start + page_tokens]:
            running.update(token.to_bytes(4, "little"))
        hashes.append(int.from_bytes(running.copy().digest(), "little"))
    return hashes


@dataclass(frozen=True, slots=True)
class Engine:
    """One model instance, as it describes itself.

    Attributes:
        name: Unique among the living.
        role: PREFILLER or DECODER.
        boot: Of this start of it.
        fingerprint: Engines that exchange pages have the same.
        address: Opaque.
        page_tokens: In which prefixes are compared.
    """

    name: str
    role: str
    boot: bytes
    fingerprint: bytes
    address: bytes = b""
    page_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Load:
    """What an engine tells of itself.

    Attributes:
        waiting: Tokens to be computed (prefiller), requests that run (decoder).
        free_pages: Of its cache.
        draining: It takes no new requests.
    """

    waiting: int = 0
    free_pages: int = 1
    draining: bool = False


@dataclass(slots=True)
class Member:
    """An engine that is there.

    Attributes:
        engine: What it is.
        heard: When it was heard of last, s.
        load: As of then.
        assigned: What was routed to it and may not be in ``load``: when, how much.
    """

    engine: Engine
    heard: float
    load: Load = field(default_factory=Load)
    assigned: deque[tuple[float, int]] = field(default_factory=deque)
    prefixes: OrderedDict[int, None] = field(default_factory=OrderedDict)

    @property
    def work(self) -> int:
        """What it has to do, as far as is known."""
        return self.load.waiting + sum(amount for _, amount in self.assigned)

    def hit(self, prefix: Sequence[int]) -> int:
        """Counts the pages at the beginning of a prompt that it likely has."""
        for count, value in enumerate(prefix):
            if value not in self.prefixes:
                return count
        return len(prefix)

    def remember(self, prefix: Iterable[int]) -> None:
        """Notes that it computes these pages."""
        for value in prefix:
            self.prefixes[value] = None
            self.prefixes.move_to_end(value)
        while len(self.prefixes) > PREFIXES_MAX:
            self.prefixes.popitem(last=False)


@dataclass(frozen=True, slots=True)
class Choice:
    """Who serves a prompt.

    Attributes:
        prefiller: Computes it.
        decoder: Generates.
        reused_tokens: That the prefiller likely has already.
    """

    prefiller: Engine
    decoder: Engine
    reused_tokens: int


class Fleet:
    """The engines that are there.

    Attributes:
        lease_s: An engine that is not heard of for this long is not there any more.
    """

    def __init__(self, lease_s: float) -> None:
        """Begins without any."""
        self.lease_s = lease_s
        self._members: dict[str, Member] = {}

    def __iter__(self) -> Iterator[Member]:
        """In the order of their names."""
        return iter(sorted(self._members.values(), key=lambda member: member.engine.name))

    def __len__(self) -> int:
        """How many there are."""
        return len(self._members)

    def join(self, engine: Engine, now: float) -> Member:
        """Takes an engine in; one with the same name and boot is replaced (its stream broke).

        Raises:
            Conflict: NAME_TAKEN: another one with that name lives.
        """
        self.expire(now)
        there = self._members.get(engine.name)
        if there is not None and there.engine.boot != engine.boot:
            raise errors.Conflict(
                f"engine {engine.name!r} is there already, with another boot; give this one "
                f"another name, or wait until that one has been silent for {self.lease_s:g} s",
                reason="NAME_TAKEN",
            )
        member = Member(engine, now)
        if there is not None:
            member.prefixes = there.prefixes
        self._members[engine.name] = member
        return member

    def report(self, member: Member, load: Load, now: float) -> None:
        """Takes what an engine tells of its load.

        What was routed to it before its last report is in this one.
        """
        while member.assigned and member.assigned[0][0] < member.heard:
            member.assigned.popleft()
        member.heard = now
        member.load = load

    def leave(self, member: Member) -> None:
        """Forgets an engine, unless a newer stream of it has come."""
        if self._members.get(member.engine.name) is member:
            del self._members[member.engine.name]

    def expire(self, now: float) -> list[Engine]:
        """Forgets engines that were silent for the lease, and tells which."""
        silent = [m for m in self._members.values() if now - m.heard >= self.lease_s]
        for member in silent:
            self.leave(member)
        return [member.engine for member in silent]

    def route(
        self, tokens: int, prefix: Sequence[int], exclude: Collection[str], now: float
    ) -> Choice:
        """Chooses who serves a prompt.

        Args:
            tokens: Of the prompt.
            prefix: :func:`prefix_hashes` of it.
            exclude: Names of engines that were tried already.
            now: s.

        Raises:
            Unavailable: NO_PREFILLER, NO_DECODER: none that may be chosen.
        """
        self.expire(now)
        able = [m for m in self if not m.load.draining and m.engine.name not in exclude]
        decoders = [m for m in able if m.engine.role == DECODER]
        if not decoders:
            raise self._nobody(DECODER, exclude)
        models = {m.engine.fingerprint for m in decoders}
        prefillers = [
            m for m in able if m.engine.role == PREFILLER and m.engine.fingerprint in models
        ]
        if not prefillers:
            raise self._nobody(PREFILLER, exclude)

        def left(member: Member) -> int:
            return max(0, tokens - member.hit(prefix) * member.engine.page_tokens)

        prefiller = min(prefillers, key=lambda m: m.work + left(m))
        reused = tokens - left(prefiller)
        decoder = min(
            (m for m in decoders if m.engine.fingerprint == prefiller.engine.fingerprint),
            key=lambda m: (not m.load.free_pages, m.work),
        )
        prefiller.assigned.append((now, tokens - reused))
        prefiller.remember(prefix)
        decoder.assigned.append((now, 1))
        return Choice(prefiller.engine, decoder.engine, reused)

    def _nobody(self, role: str, exclude: Collection[str]) -> errors.Unavailable:
        known = [m for m in self if m.engine.role == role]
        why = f"{len(known)} known" if known else "none is registered"
        drained = sum(m.load.draining for m in known)
        tried = sum(m.engine.name in exclude for m in known)
        if drained or tried:
            why += f", {drained} of them draining, {tried} excluded"
        return errors.Unavailable(f"no {role} for this prompt: {why}", reason=f"NO_{role.upper()}")
