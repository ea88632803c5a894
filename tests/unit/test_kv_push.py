# SPDX-License-Identifier: Apache-2.0
"""A prefiller's jobs without a daemon: their order, how many at once, how they end."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from transferd.client import JobStatus, errors
from transferd.client.watcher import Armed
from transferd.kv.pages import Extent, PageTable
from transferd.kv.plan import GroupPlan, Pattern, Plan, Template
from transferd.kv.protocol.actions import TransferKey
from transferd.kv.push import Armor, Pushes, Unit, Ways, stage_of

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


REFUSED = errors.InvalidRequest("no such page", reason="DESTINATION_BOUNDS")
STEPS = ((0,), (1,), (2,), (3,))
FAR = 1 << 40


class FakeJob:
    def __init__(self, operation: Any) -> None:
        self.operation = operation
        self.status = JobStatus.PENDING
        self.detail = ""
        self.cancelled = False

    @property
    def armed(self) -> bool:
        return isinstance(self.operation, Armed)

    @property
    def imm(self) -> int:
        job = self.operation.job if self.armed else self.operation
        return int(job.imm)

    @property
    def result(self) -> Any:
        return SimpleNamespace(status=self.status, detail=self.detail)

    def done(self) -> bool:
        return self.status is not JobStatus.PENDING

    def cancel(self, timeout_s: float) -> None:
        self.cancelled = True
        raise errors.WaitTimeout("not yet")

    def end(self, status: JobStatus = JobStatus.OK, detail: str = "") -> None:
        self.status, self.detail = status, detail


class FakePump:
    """What pushes need of a pump."""

    def __init__(self, limit: int) -> None:
        self.client = self
        self.batch_limit = limit
        self.session = SimpleNamespace(table_limit=1 << 20, handles={b"grant": 1})
        self.jobs: list[FakeJob] = []
        self.posted: list[Callable[[float], object]] = []
        self.waiting: list[Callable[[Exception | None], None]] = []
        self.room = 1 << 30
        self.timers: list[float] = []
        self.refuses: Callable[[Any], Exception | None] = lambda operation: None

    def submit(self, operations: Sequence[Any], timeout_s: float) -> list[FakeJob]:
        assert timeout_s == 0
        made: list[FakeJob] = []
        for operation in operations:
            refused = self.refuses(operation)
            if refused is None and not self.room:
                refused = errors.WaitTimeout("full")
            if refused is not None:
                refused.jobs = made  # type: ignore[attr-defined]
                raise refused
            made.append(FakeJob(operation))
            self.jobs.append(made[-1])
            self.room -= 1
        return made

    def later(self, seconds: float, call: Callable[[], object]) -> None:
        self.timers.append(seconds)

    def kick(self) -> None:
        pass

    def post(self, call: Callable[[float], object]) -> None:
        self.posted.append(call)

    def when_open(self, descriptor: bytes, call: Callable[[Exception | None], None]) -> None:
        self.waiting.append(call)

    def settle(self) -> None:
        while self.posted:
            self.posted.pop(0)(0.0)


class FakeWatcher:
    value = 0


def make_plan() -> Plan:
    """Each step is a layer of 8 pages of 64 bytes, far behind the beginning of the region."""
    group: Any = SimpleNamespace(name="0", page_tokens=1, num_pages=8, window_tokens=0)
    patterns = tuple(
        (Pattern(0, "cache", "cache", 64, FAR + 512 * step, 512 * step, 64, 64, 0, 0),)
        for step in range(len(STEPS))
    )
    whole = Template(0, 1, 1, 1, None)
    return Plan((GroupPlan("0", 1, group, group, True),), STEPS, patterns, (whole,))


class World:
    def __init__(self, limit: int = 64) -> None:
        self.pump = FakePump(limit)
        self.ended: list[Unit] = []
        self.pushes = Pushes(self.pump, self.ended.append)  # type: ignore[arg-type]
        self.watcher: Any = FakeWatcher()

    def unit(
        self, transfer: int, imm: int, *, armed: int = 0, grant: bytes = b"grant", stages: int = 4
    ) -> Unit:
        delivery = make_plan().delivery(Extent(3), {"0": PageTable([5, 6, 7])})
        ways = Ways({"cache": None}, {"cache": grant}, imm, stages, STEPS, 1.0)  # type: ignore[dict-item]
        ranks = {layer: layer for layer in range(4)}
        armor = Armor(armed, self.watcher, 0, ranks) if armed else None

        def begin() -> Any:
            return delivery.sending(0, 3, {"0": PageTable([0, 1, 2])})

        unit = Unit(TransferKey(1, transfer), 0, ways, begin, None, armor)
        self.pushes.add(unit)
        return unit

    def turn(self) -> list[int]:
        """Lets it submit; tells the immediates of what it did."""
        before = len(self.pump.jobs)
        self.pushes.turn()
        self.pump.settle()
        return [job.imm for job in self.pump.jobs[before:]]


def test_stages_are_as_even_as_they_can_be() -> None:
    assert [stage_of(step, 7, 3) for step in range(7)] == [0, 0, 0, 1, 1, 2, 2]
    assert [stage_of(step, 4, 4) for step in range(4)] == [0, 1, 2, 3]


def test_earlier_layers_of_all_come_first_and_what_is_computed_before_them() -> None:
    world = World()
    world.unit(1, 10, armed=1)
    world.unit(2, 20, armed=1)
    world.unit(3, 30)
    assert world.turn() == [30, 31, 32, 33, 10, 20, 11, 21, 12, 22, 13, 23]
    assert [job.armed for job in world.pump.jobs] == [False] * 4 + [True] * 8


def test_a_layer_that_is_computed_meanwhile_need_not_wait() -> None:
    world = World()
    world.watcher.value = 2
    world.unit(1, 10, armed=1)
    world.turn()
    assert [job.armed for job in world.pump.jobs] == [False, False, True, True]


def test_steps_of_a_stage_that_are_computed_go_together() -> None:
    world = World()
    world.unit(1, 10, stages=2)
    assert world.turn() == [10, 11]
    first, second = (job.operation for job in world.pump.jobs)
    assert first.src_pages.tolist() == [0, 1, 2, 8, 9, 10]
    assert first.dst_pages.tolist() == [5, 6, 7, 13, 14, 15]
    assert (first.src_offset, second.src_offset) == (FAR, FAR + 1024)
    assert (first.dst_offset, second.dst_offset) == (0, 1024)


def test_steps_that_are_not_computed_are_armed_one_by_one() -> None:
    world = World()
    world.watcher.value = 2
    world.unit(1, 10, armed=1, stages=1)
    world.turn()
    jobs = world.pump.jobs
    assert [job.armed for job in jobs] == [False, True, True]
    assert [job.operation.value for job in jobs[1:]] == [3, 4]
    assert jobs[0].operation.src_pages.tolist() == [0, 1, 2, 8, 9, 10]
    assert jobs[1].operation.job.src_pages.tolist() == [0, 1, 2]


def test_steps_go_together_up_to_a_number_of_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transferd.kv.plan.TOGETHER_PIECES_MAX", 9)
    world = World()
    world.unit(1, 10, stages=1)
    world.turn()
    assert [len(job.operation.src_pages) for job in world.pump.jobs] == [9, 3]


def test_as_many_layers_ahead_as_there_is_room_for() -> None:
    world = World(limit=8)  # half of it may be armed
    world.unit(1, 10, armed=1)
    world.unit(2, 20, armed=1)
    assert world.turn() == [10, 20, 11, 21]
    assert world.turn() == []
    for job in world.pump.jobs[:2]:
        job.end()
    assert world.turn() == [12, 22]
    for job in world.pump.jobs:
        job.end()
    assert world.turn() == [13, 23]
    for job in world.pump.jobs:
        job.end()
    world.turn()
    assert [unit.failed for unit in world.ended] == ["", ""]
    assert len(world.pushes) == 0


def test_some_room_is_there_before_more_is_armed() -> None:
    world = World(limit=128)  # 64 may be armed; less room than 2 is none
    for number in range(17):
        world.unit(number, 10 * number, armed=1)
    assert len(world.turn()) == 64
    world.pump.jobs[0].end()
    assert world.turn() == []
    world.pump.jobs[1].end()
    assert len(world.turn()) == 2


def test_an_end_is_told_before_others_are_submitted() -> None:
    world = World()
    unit = world.unit(1, 10)
    world.turn()
    for job in world.pump.jobs:
        job.end()
    world.pushes._ended = lambda unit: world.pump.post(lambda _: world.ended.append(unit))
    world.unit(2, 20)
    assert world.turn() == []
    assert world.ended == [unit]
    assert world.turn() == [20, 21, 22, 23]


def test_what_finds_no_room_is_tried_again() -> None:
    world = World()
    world.pump.room = 2
    world.unit(1, 10)
    assert world.turn() == [10, 11]
    world.pump.room = 100
    assert world.turn() == [12, 13]
    for job in world.pump.jobs:
        job.end()
    world.turn()
    assert len(world.ended) == 1


def test_what_a_refused_job_of_another_leaves_without_room_is_tried_again() -> None:
    world = World()
    world.pump.refuses = lambda operation: REFUSED if operation.imm == 10 else None
    world.pump.room = 3
    world.unit(1, 10)
    world.unit(2, 20)
    assert world.turn() == [11, 12, 13]
    assert [unit.key.transfer for unit in world.ended] == []
    world.pump.room = 100
    assert world.turn() == [20, 21, 22, 23]
    for job in world.pump.jobs:
        job.end()
    world.turn()
    assert {unit.key.transfer: bool(unit.failed) for unit in world.ended} == {1: True, 2: False}


def test_copies_that_no_stream_of_a_gpu_has_room_for_are_tried_again_soon() -> None:
    world = World()
    world.unit(1, 10, armed=1)
    world.pump.refuses = lambda operation: (
        errors.QuotaExceeded("later", reason="ARMED_COPIES") if operation.job.imm > 11 else None
    )
    assert world.turn() == [10, 11]
    assert len(world.pump.timers) == 1
    world.pump.refuses = lambda operation: None
    assert world.turn() == [12, 13]
    assert not world.ended


def test_a_stopped_transfer_ends_when_its_jobs_have() -> None:
    world = World(limit=8)
    unit = world.unit(1, 10, armed=1)
    other = world.unit(2, 20)
    world.turn()
    world.pushes.stop(unit.key)
    mine = [job for job in world.pump.jobs if job.imm < 20]
    assert mine
    assert all(job.cancelled for job in mine)
    assert world.ended == []
    for job in world.pump.jobs:
        job.end(JobStatus.CANCELLED if job in mine else JobStatus.OK)
    world.turn()
    for job in world.pump.jobs:
        if not job.done():
            job.end()
    world.turn()
    assert {unit.failed: other.failed} == {"CANCELLED": ""}
    assert sorted(world.ended, key=lambda u: u.key) == [unit, other]
    assert not [job for job in world.pump.jobs if job.imm == 13]  # not even submitted


def test_one_that_was_not_begun_ends_at_once_when_it_is_stopped() -> None:
    world = World()
    unit = world.unit(1, 10)
    world.pushes.stop(unit.key)
    assert world.ended == [unit]
    assert world.turn() == []


@pytest.mark.parametrize(("detail", "dead"), [("STALE", False), ("REVOKED", True)])
def test_a_job_that_fails_ends_the_rest_of_its_unit(detail: str, dead: bool) -> None:
    world = World()
    unit = world.unit(1, 10)
    world.turn()
    world.pump.jobs[0].end(JobStatus.PEER_LOST, detail)
    world.turn()
    assert all(job.cancelled for job in world.pump.jobs[1:])
    for job in world.pump.jobs[1:]:
        job.end(JobStatus.CANCELLED)
    world.turn()
    assert world.ended == [unit]
    assert (unit.failed, unit.dead) == (f"PEER_LOST ({detail})", dead)


def test_a_refused_job_does_not_harm_others() -> None:
    world = World()
    bad, good = world.unit(1, 10), world.unit(2, 20)
    world.pump.refuses = lambda operation: REFUSED if operation.imm == 11 else None
    world.turn()
    for job in world.pump.jobs:
        job.end()
    world.turn()
    assert sorted(world.ended, key=lambda u: u.key) == [bad, good]
    assert "no such page" in bad.failed
    assert good.failed == ""


def test_units_wait_until_their_destination_is_open() -> None:
    world = World()
    unit, lost = world.unit(1, 10, grant=b"far"), world.unit(2, 20, grant=b"gone")
    assert world.turn() == []
    opened, failed = world.pump.waiting
    world.pump.session.handles[b"far"] = 2
    opened(None)
    assert world.turn() == [10, 11, 12, 13]
    failed(errors.StaleDescriptor("restarted"))
    assert world.ended == [lost]
    assert lost.dead
    assert not unit.failed
