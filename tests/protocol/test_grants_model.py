# SPDX-License-Identifier: Apache-2.0
"""Sessions, regions, grants and counters of two real daemons against a model of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, ClassVar, cast

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    multiple,
    rule,
    run_state_machine_as_test,
)

import transferd
from transferd.native.names import JobStatus

from support.waiting import WAIT_S, eventually

if TYPE_CHECKING:
    from support.daemon import DaemonProcess

    Pair = tuple[DaemonProcess, DaemonProcess]

pytestmark = pytest.mark.slow

LENGTH = 4096
IMMS = 8
EXAMPLES = 40
STEPS = 40


@dataclass(eq=False)
class Owner:
    """A session, and what the model says of it.

    Attributes:
        counts: Landed writes by immediate.
    """

    client: transferd.Client
    counts: dict[int, int] = field(default_factory=dict)
    closed: bool = False


@dataclass(eq=False)
class Memory:
    """A region and the bytes that it should hold."""

    owner: Owner
    region: transferd.Region
    content: bytearray
    closed: bool = False

    @property
    def gone(self) -> bool:
        return self.closed or self.owner.closed


@dataclass(eq=False)
class Granted:
    """A grant, and what it allows."""

    memory: Memory
    grant: transferd.Grant
    offset: int
    length: int
    imms: range
    revoked: bool = False

    @property
    def gone(self) -> bool:
        return self.revoked or self.memory.gone


def idle(daemon: DaemonProcess) -> bool:
    """Whether a daemon has no session."""
    return bool(daemon.status().sessions == 0)


class Grants(RuleBasedStateMachine):
    """The rules; a subclass names the daemons."""

    pair: ClassVar[Pair]

    owners = Bundle("owners")
    memories = Bundle("memories")
    grants = Bundle("grants")

    def __init__(self) -> None:
        super().__init__()
        self.all_owners: list[Owner] = []
        self.senders: list[transferd.Client] = []
        self.sources: list[transferd.Region] = []
        near, far = self.pair
        for daemon, ring in ((near, True), (far, True), (near, False)):
            sender = transferd.Client(daemon.socket, shared_memory=ring)
            self.senders.append(sender)
            self.sources.append(sender.alloc(LENGTH))

    @initialize(target=grants)
    def begin(self) -> Granted:
        memory = self.alloc(self.attach(1))
        return cast("Granted", self.give(memory, 0, LENGTH, 0, IMMS))

    @rule(target=owners, where=st.integers(0, 1))
    def attach(self, where: int) -> Owner:
        owner = Owner(transferd.Client(self.pair[where].socket))
        self.all_owners.append(owner)
        return owner

    @rule(target=memories, owner=owners)
    def alloc(self, owner: Owner) -> Memory:
        if owner.closed:
            return multiple()  # type: ignore[return-value]
        return Memory(owner, owner.client.alloc(LENGTH), bytearray(LENGTH))

    @rule(
        target=grants,
        memory=memories,
        offset=st.integers(0, LENGTH - 1),
        length=st.integers(1, LENGTH),
        first=st.integers(0, IMMS - 1),
        count=st.integers(0, IMMS),
    )
    def give(self, memory: Memory, offset: int, length: int, first: int, count: int) -> Granted:
        length = min(length, LENGTH - offset)
        imms = range(first, min(IMMS, first + count))
        if memory.gone:
            with pytest.raises((transferd.InvalidRequest, transferd.Unavailable)):
                memory.region.grant(offset, length, imms=imms)
            return multiple()  # type: ignore[return-value]
        grant = memory.region.grant(offset, length, imms=imms)
        for imm in imms:
            memory.owner.counts.setdefault(imm, 0)
        return Granted(memory, grant, offset, length, imms)

    @rule(
        granted=grants,
        who=st.integers(0, 2),
        offset=st.integers(0, LENGTH + 1),
        length=st.integers(0, LENGTH),
        imm=st.integers(0, IMMS),
        data=st.integers(0, 255),
    )
    def write(
        self, granted: Granted, who: int, offset: int, length: int, imm: int, data: int
    ) -> None:
        source = self.sources[who]
        source.view[:length] = bytes([data]) * length
        fits = offset <= granted.length and length <= granted.length - offset
        allowed = fits and imm in granted.imms and not granted.gone
        if not allowed:
            with pytest.raises(transferd.TransferdError) as caught:
                self.send(who, granted, offset, length, imm)
            wanted = {"REVOKED", "GRANT_REVOKED"}
            if not granted.gone:
                wanted = {"IMM_RANGE", "DESTINATION_BOUNDS"}
            assert caught.value.reason in wanted
            return
        assert self.send(who, granted, offset, length, imm) is JobStatus.OK
        owner = granted.memory.owner
        owner.counts[imm] += 1
        at = granted.offset + offset
        granted.memory.content[at : at + length] = bytes([data]) * length
        owner.client.counter(imm).wait(owner.counts[imm], WAIT_S)

    def send(self, who: int, granted: Granted, offset: int, length: int, imm: int) -> JobStatus:
        """Writes and waits."""
        job = self.senders[who].write(
            self.sources[who][:length], granted.grant.descriptor, offset, imm=imm
        )
        return job.wait(WAIT_S)

    @rule(granted=grants)
    def revoke(self, granted: Granted) -> None:
        if not granted.memory.gone:
            granted.grant.revoke()
            granted.revoked = True

    @rule(memory=consumes(memories))
    def close_region(self, memory: Memory) -> None:
        if not memory.gone:
            self.same(memory)
            memory.region.close()
        memory.closed = True

    @rule(owner=consumes(owners))
    def close_session(self, owner: Owner) -> None:
        owner.client.close()
        owner.closed = True

    @rule(memory=memories)
    def same(self, memory: Memory) -> None:
        if not memory.gone:
            assert memory.region.view == memory.content

    @invariant()
    def counts_are_exact(self) -> None:
        for owner in self.all_owners:
            if owner.closed:
                continue
            for imm, count in owner.counts.items():
                assert tuple(owner.client.counter(imm).read()) == (count, 0, 0, 0)

    def teardown(self) -> None:
        for client in (*self.senders, *(owner.client for owner in self.all_owners)):
            client.close()
        for daemon in self.pair:
            eventually(partial(idle, daemon), "all sessions end")


@pytest.mark.timeout(240)
def test_grants_keep_to_the_model(shared_pair: Pair) -> None:
    run_state_machine_as_test(
        type("GrantsOfPair", (Grants,), {"pair": shared_pair}),
        settings=settings(
            max_examples=EXAMPLES,
            stateful_step_count=STEPS,
            deadline=None,
            database=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
