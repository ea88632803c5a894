# SPDX-License-Identifier: Apache-2.0
"""Plans of the SDK, on real daemons: to another daemon and to one's own; tables good and bad."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import transferd
import transferd.aio
from transferd import Armed, Barrier, Imm, Read, Scatter, Send, Write, WritePages
from transferd.native.client_half import lib
from transferd.native.names import Detail, JobStatus

from support.both_ways import LENGTH, filled, granted
from support.raw_sender import LENGTH as RAW_LENGTH
from support.raw_sender import RawSender, raw_sender
from support.waiting import WAIT_S

if TYPE_CHECKING:
    import random
    from collections.abc import Callable, Iterator

    from transferd import Client

    from support.daemon import DaemonProcess

    Pair = tuple[DaemonProcess, DaemonProcess]

pytestmark = pytest.mark.slow

U64 = (1 << 64) - 1
OK, CANCELLED, PENDING = JobStatus.OK, JobStatus.CANCELLED, JobStatus.PENDING


def test_launched_again_and_again(sender: Client, receiver: Client, seeded: random.Random) -> None:
    source = filled(sender, seeded)
    target, grant = granted(receiver)
    desc = grant.descriptor
    templates: list[Any] = [
        Write(src=source[100:5000], dst=desc, dst_offset=7, imm=1),
        Imm(dst=desc, imm=1),
        Scatter(src=source, targets=[(desc, 0, 8000, 100), (desc, 50, 9000, 60)], imm=1),
        Barrier(group=[desc, desc, desc], imm=1),
        WritePages(
            src=source, src_pages=[1, 2], dst=desc, dst_pages=[5, 4], page_bytes=4096, imm=1
        ),
    ]
    plans = [sender.plan(template) for template in templates]
    assert receiver.counter(1).value == 0  # made, not run
    for _ in range(3):
        jobs = [plan.launch() for plan in plans for _ in range(2)]  # several at once
        assert {job.wait(WAIT_S) for job in jobs} == {OK}
    mixed = sender.submit([plans[0], templates[1], plans[4]])  # a plan in a batch is a launch
    assert {job.wait(WAIT_S) for job in mixed} == {OK}
    wanted = 6 * (1 + 1 + 2 + 3 + 2) + 1 + 1 + 2
    receiver.counter(1).wait(wanted, WAIT_S)
    assert receiver.counter(1).value == wanted
    assert target.view[7:4907] == source.view[100:5000]
    assert target.view[9000:9060] == source.view[50:110]
    assert target.view[4 * 4096 : 5 * 4096] == source.view[2 * 4096 : 3 * 4096]
    back = sender.alloc(64)
    read = sender.plan(Read(src=desc, dst=back, src_offset=9000))
    assert read.launch().wait(WAIT_S) is OK
    assert back.view == target.view[9000:9064]
    for plan in [*plans, read]:
        plan.close()
        plan.close()


def test_rows_say_what_is_sent(sender: Client, receiver: Client, seeded: random.Random) -> None:
    source = filled(sender, seeded)
    target, grant = granted(receiver)
    desc = grant.descriptor
    window = source[1000:21000]
    with sender.plan(
        Scatter(src=window, targets=[(desc, 5, 100 * i, 10) for i in range(8)], imm=2), table=True
    ) as plan:
        assert plan.table is not None
        rows = np.asarray(plan.table)
        assert rows.shape == (8, 3)
        assert rows.tolist() == [[5, 100 * i, 10] for i in range(8)]
        assert plan.launch().wait(WAIT_S) is OK
        for round_ in range(1, 4):
            sizes = np.array([seeded.randrange(2000) for _ in range(8)])
            rows[:, 0] = np.arange(8) * 2000
            rows[:, 1] = np.arange(8) * 4000
            rows[:, 2] = sizes
            target.view[:] = bytes(LENGTH)
            assert plan.launch().wait(WAIT_S) is OK
            receiver.counter(2).wait(8 + 8 * round_, WAIT_S)
            for i, size in enumerate(sizes.tolist()):
                at = 4000 * i
                assert target.view[at : at + size] == window.view[2000 * i : 2000 * i + size]
                assert not any(target.view[at + size : at + 4000])
        plan.count = 3
        assert plan.launch().wait(WAIT_S) is OK
        receiver.counter(2).wait(8 + 24 + 3, WAIT_S)
        assert receiver.counter(2).value == 8 + 24 + 3


def test_pages_and_a_write(sender: Client, receiver: Client, seeded: random.Random) -> None:
    source = filled(sender, seeded)
    target, grant = granted(receiver)
    pages = sender.plan(
        WritePages(
            src=source, src_pages=range(16), dst=grant.descriptor, dst_pages=range(16),
            page_bytes=1024, imm=3,
        )
    )  # fmt: skip
    rows = np.asarray(pages.table)
    assert rows.dtype == np.uint32
    assert rows.tolist() == [[i, i] for i in range(16)]
    rows[:5, 0], rows[:5, 1] = [9, 8, 7, 6, 5], [0, 2, 4, 6, 8]
    pages.count = 5
    assert pages.launch().wait(WAIT_S) is OK
    receiver.counter(3).wait(5, WAIT_S)
    for page in range(5):
        at = 2048 * page
        assert target.view[at : at + 1024] == source.view[(9 - page) * 1024 : (10 - page) * 1024]
    pages.count = 0
    assert pages.launch().wait(WAIT_S) is OK
    write = sender.plan(Write(src=source[4096:], dst=grant.descriptor, imm=4), table=True)
    np.asarray(write.table)[0] = [10, 30000, 777]
    assert write.launch().wait(WAIT_S) is OK
    receiver.counter(4).wait(1, WAIT_S)
    assert target.view[30000:30777] == source.view[4106:4883]
    assert receiver.counter(3).value == 5


def test_armed_launches_read_their_rows_when_they_start(
    sender: Client, receiver: Client, seeded: random.Random
) -> None:
    source = filled(sender, seeded)
    target, grant = granted(receiver)
    with (
        sender.watcher() as watcher,
        sender.plan(Write(src=source, dst=grant.descriptor, imm=5), table=True) as plan,
    ):
        assert plan.table is not None
        jobs = [sender.arm(watcher, 1, plan)]
        jobs += sender.submit([Armed(watcher=watcher, value=value, job=plan) for value in (2, 3)])
        for value, job in enumerate(jobs, 1):
            assert job.status is PENDING
            for column, number in enumerate((value, 1000 * value, 500)):
                plan.table[0, column] = number
            watcher.bump()
            assert job.wait(WAIT_S) is OK
            assert target.view[1000 * value :][:500] == source.view[value : value + 500]
        left = sender.arm(watcher, 9, plan)
        plan.close()  # what is armed goes on
        watcher.bump(6)
        assert left.wait(WAIT_S) is OK
    receiver.counter(5).wait(4, WAIT_S)


def test_deadline_fence_revoke(sender: Client, receiver: Client) -> None:
    source = sender.alloc(LENGTH)
    _, grant = granted(receiver)
    with sender.watcher() as watcher:
        late = sender.plan(Write(src=source, dst=grant.descriptor, imm=6, deadline_s=0.01))
        job = sender.arm(watcher, 1, late)
        with pytest.raises(transferd.JobFailed) as caught:
            job.wait(WAIT_S)
        assert caught.value.status is JobStatus.DEADLINE
        assert late.launch(deadline_s=20).wait(WAIT_S) is OK
        pages = sender.plan(
            WritePages(
                src=source, src_pages=[0], dst=grant.descriptor, dst_pages=[0], page_bytes=1, imm=7
            )
        )
        fenced = sender.arm(watcher, 1, pages)
        grant.fence([7])
        assert fenced.status is CANCELLED
        with pytest.raises(transferd.CounterFault):  # of how many pages nobody knows
            receiver.counter(7).wait(1, WAIT_S)
        assert pages.launch().wait(WAIT_S) is OK
        grant.revoke()
        with pytest.raises(transferd.JobFailed, match="revoked"):
            pages.launch().wait(WAIT_S)


def test_closed_under_launches(sender: Client, receiver: Client, seeded: random.Random) -> None:
    source = filled(sender, seeded)
    target, grant = granted(receiver)
    plan = sender.plan(Write(src=source, dst=grant.descriptor, imm=8), table=True)
    jobs = [plan.launch() for _ in range(50)]
    plan.close()
    assert {job.wait(WAIT_S) for job in jobs} == {OK}
    receiver.counter(8).wait(50, WAIT_S)
    assert target.view == source.view


def test_a_table_outlives_its_client(shared_pair: Pair) -> None:
    """A view that somebody keeps is memory still, when plan and Client are gone."""
    with transferd.Client(shared_pair[0].socket) as client:
        _, grant = granted(client)
        plan = client.plan(Write(src=client.alloc(64), dst=grant.descriptor, imm=1), table=True)
        rows = np.asarray(plan.table)
    del client, plan, grant
    rows[0] = [1, 2, 3]
    assert rows.tolist() == [[1, 2, 3]]


def test_asyncio(shared_pair: Pair, seeded: random.Random) -> None:
    async def run() -> None:
        async with (
            transferd.aio.Client(shared_pair[1].socket) as receiver,
            transferd.aio.Client(shared_pair[0].socket) as sender,
        ):
            region = await receiver.alloc(LENGTH)
            grant = await region.grant(imms=range(4))
            source = await sender.alloc(LENGTH)
            source.view[:] = seeded.randbytes(LENGTH)
            template = Write(src=source, dst=grant.descriptor, imm=1)
            async with (
                await sender.plan(template, table=True) as plan,
                await sender.watcher() as watcher,
            ):
                assert await (await plan.launch()) is OK
                assert plan.table is not None
                plan.table[0, 2] = 0
                assert await (await plan.launch(deadline_s=20)) is OK
                job = await sender.arm(watcher, 1, plan)
                (other,) = await sender.submit([plan])
                assert await other is OK
                watcher.bump()
                assert await job is OK
                await (await receiver.counter(1)).wait(4, WAIT_S)
            assert region.view == source.view
            with pytest.raises(transferd.Conflict, match="closed"):
                await plan.launch()

    asyncio.run(run())


# ---- wrong values ----


@pytest.mark.parametrize(
    ("row", "detail"),
    [
        ((LENGTH, 0, 1), "SOURCE_BOUNDS"),
        ((0, 0, LENGTH + 1), "SOURCE_BOUNDS"),
        ((U64, U64, U64), "SOURCE_BOUNDS"),
        ((1, 0, U64), "SOURCE_BOUNDS"),
        ((0x7FF8 << 48, 0, 8), "SOURCE_BOUNDS"),
        ((0, LENGTH, 1), "DESTINATION_BOUNDS"),
        ((0, LENGTH - 7, 8), "DESTINATION_BOUNDS"),
        ((0, U64 - 7, 8), "DESTINATION_BOUNDS"),
    ],
)
def test_rows_that_leave_source_or_grant(
    sender: Client, receiver: Client, row: tuple[int, int, int], detail: str
) -> None:
    source = sender.alloc(LENGTH)
    source.view[:] = b"\xee" * LENGTH
    target, grant = granted(receiver)
    desc = grant.descriptor
    write = sender.plan(Write(src=source, dst=desc, imm=1), table=True)
    scatter = sender.plan(Scatter(src=source, targets=[(desc, 0, 0, 8)] * 4, imm=1), table=True)
    for plan in (write, scatter):
        rows = np.asarray(plan.table)
        rows[len(rows) - 1] = row
        with pytest.raises(transferd.JobFailed) as caught:
            plan.launch().wait(WAIT_S)
        assert (caught.value.status, caught.value.detail) == (JobStatus.INVALID, detail)
    assert not any(target.view)  # of a scatter nothing is sent, either
    counter = receiver.counter(1)
    with pytest.raises(transferd.CounterFault):  # whoever waits for them is told
        counter.wait(1, WAIT_S)
    assert counter.value == 0
    rows[len(rows) - 1] = (0, 0, 8)
    assert scatter.launch().wait(WAIT_S) is OK  # the plan is as good as before


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (lambda c, j, d: c.plan(None), transferd.InvalidRequest, "not of NoneType"),
        (lambda c, j, d: c.plan([j]), transferd.InvalidRequest, "not of list"),
        (lambda c, j, d: c.plan(c.plan(j)), transferd.InvalidRequest, "not of Plan"),
        (
            lambda c, j, d: c.plan(Armed(watcher=c.watcher(), value=1, job=j)),
            transferd.InvalidRequest,
            "arm(watcher, value, plan)",
        ),
        (lambda c, j, d: c.plan(Send(dst=d, data=b"x")), transferd.InvalidRequest, "use send()"),
        (
            lambda c, j, d: c.plan(Imm(dst=d, imm=1), table=True),
            transferd.InvalidRequest,
            "a Imm has no sizes",
        ),
        (
            lambda c, j, d: c.plan(Scatter(src=j.src, targets=[], imm=1), table=True),
            transferd.InvalidRequest,
            "none are there",
        ),
        (
            lambda c, j, d: c.plan(Write(src=j.src, dst=d, imm=99)),
            transferd.AccessDenied,
            "outside the grant",
        ),
        (
            lambda c, j, d: c.plan(Write(src=j.src, dst=d, imm=1, dst_offset=1)),
            transferd.JobFailed,
            "leave the grant",
        ),
        (
            lambda c, j, d: c.plan(
                WritePages(
                    src=j.src, src_pages=[0, 9], dst=d, dst_pages=[0, 1], page_bytes=LENGTH, imm=1
                )
            ),
            transferd.InvalidRequest,
            "src_pages[1] is 9",
        ),
        (
            lambda c, j, d: c.plan(
                WritePages(
                    src=j.src,
                    src_pages=np.zeros(1 << 20, int),
                    dst=d,
                    dst_pages=np.zeros(1 << 20, int),
                    page_bytes=1,
                    imm=1,
                )
            ),
            transferd.InvalidRequest,
            "raise limits.arena",
        ),
        (lambda c, j, d: c.plan(j).count, transferd.InvalidRequest, "without table=True"),
        (
            lambda c, j, d: setattr(c.plan(j, table=True), "count", 2),
            transferd.InvalidRequest,
            "from 0 to 1, which the plan was made with, not 2",
        ),
        (
            lambda c, j, d: setattr(c.plan(j, table=True), "count", -1),
            transferd.InvalidRequest,
            "not -1",
        ),
        (lambda c, j, d: c.plan(j).launch(deadline_s=0), transferd.InvalidRequest, "above 0"),
    ],
)
def test_wrong_values(
    shared_pair: Pair, call: Callable[..., object], kind: type[Exception], message: str
) -> None:
    with transferd.Client(shared_pair[0].socket) as client:
        source = client.alloc(LENGTH)
        _, grant = granted(client)
        job = Write(src=source, dst=grant.descriptor, imm=1)
        with pytest.raises(kind) as caught:
            call(client, job, grant.descriptor)
        assert message in str(caught.value)
        assert client.plan(job).launch().wait(WAIT_S) is OK  # nothing of it is left behind


def test_a_closed_plan(sender: Client) -> None:
    source = sender.alloc(LENGTH)
    _, grant = granted(sender)
    plan = sender.plan(Write(src=source, dst=grant.descriptor, imm=1), table=True)
    plan.close()
    for use in (plan.launch, lambda: plan.table, lambda: plan.count, plan.request):
        with pytest.raises(transferd.Conflict, match="the plan is closed"):
            use()


def test_plans_of_another_client(sender: Client, shared_pair: Pair) -> None:
    with transferd.Client(shared_pair[0].socket) as other:
        source = other.alloc(LENGTH)
        _, grant = granted(other)
        plan = other.plan(Write(src=source, dst=grant.descriptor, imm=1))
        with pytest.raises(transferd.InvalidRequest, match="another Client's"):
            sender.submit([plan])


def test_without_shared_memory(shared_pair: Pair) -> None:
    with transferd.Client(shared_pair[0].socket, shared_memory=False) as client:
        _, grant = granted(client)
        with pytest.raises(transferd.Conflict, match="a session over gRPC has not") as caught:
            client.plan(Imm(dst=grant.descriptor, imm=1))
        assert caught.value.reason == "NO_SHARED_MEMORY"


def test_all_are_taken(sender: Client) -> None:
    _, grant = granted(sender)
    plans = [sender.plan(Imm(dst=grant.descriptor, imm=1)) for _ in range(64)]
    with pytest.raises(transferd.QuotaExceeded, match=r"limits\.plans") as caught:
        sender.plan(Imm(dst=grant.descriptor, imm=1))
    assert caught.value.reason == "PLANS"
    plans[5].close()
    assert sender.plan(Imm(dst=grant.descriptor, imm=1)).launch().wait(WAIT_S) is OK


def test_a_table_that_changes_while_it_is_read(shared_pair: Pair) -> None:
    """Each launch ends; nothing lands behind the grant."""
    with (
        transferd.Client(shared_pair[0].socket) as sender,
        transferd.Client(shared_pair[1].socket) as receiver,
    ):
        source = sender.alloc(LENGTH)
        source.view[:] = b"\xee" * LENGTH
        region = receiver.alloc(2 * LENGTH)
        grant = region.grant(0, LENGTH, imms=[1])
        plan = sender.plan(
            Scatter(src=source, targets=[(grant.descriptor, 0, 0, 8)] * 16, imm=1), table=True
        )
        rows = np.asarray(plan.table)
        stop = threading.Event()

        def scribble() -> None:
            rng = np.random.default_rng(1)
            while not stop.is_set():
                rows[:] = rng.integers(0, 100, rows.shape)
                rows[rng.integers(16), rng.integers(3)] = U64 >> int(rng.integers(64))

        thread = threading.Thread(target=scribble)
        thread.start()
        ends = set()
        for _ in range(500):
            job = plan.launch()
            with contextlib.suppress(transferd.JobFailed):
                job.wait(WAIT_S)
            ends.add(job.status)
        stop.set()
        thread.join()
        assert ends <= {OK, JobStatus.INVALID}
        rows[:] = 1
        assert plan.launch().wait(WAIT_S) is OK
        assert not any(region.view[LENGTH:])


# ---- raw entries ----

PLAN, TABLE = int(lib.TFD_FLAG_PLAN), int(lib.TFD_FLAG_TABLE)
LAUNCH, FORGET = int(lib.TFD_OP_LAUNCH), int(lib.TFD_OP_FORGET)
BARE = {"src_region": 0, "dst_grant": 0, "length": 0, "imm": 0}


@pytest.fixture
def ring(shared_pair: Pair) -> Iterator[RawSender]:
    with raw_sender(*shared_pair) as sender:
        yield sender
        assert sender.end() == (OK, Detail.NONE)  # the session goes on


@pytest.mark.parametrize(
    ("fields", "detail"),
    [
        ({"flags": PLAN, "plan": 64}, Detail.BAD_PLAN),
        ({"flags": PLAN, "plan": (1 << 32) - 1}, Detail.BAD_PLAN),
        ({"flags": TABLE}, Detail.BAD_FLAGS),
        ({"flags": PLAN | int(lib.TFD_FLAG_ARMED)}, Detail.BAD_FLAGS),
        ({"flags": PLAN | TABLE, "argument": 4}, Detail.TABLE),
        ({"flags": PLAN | TABLE, "argument": 1 << 40}, Detail.TABLE),
        ({"flags": PLAN | TABLE, "argument": U64 - 7}, Detail.TABLE),
        ({"flags": PLAN, "dst_offset": RAW_LENGTH}, Detail.DESTINATION_BOUNDS),
        ({"flags": PLAN | TABLE, "length": RAW_LENGTH + 1}, Detail.SOURCE_BOUNDS),
        ({"op": LAUNCH} | BARE, Detail.BAD_PLAN),
        ({"op": LAUNCH, "plan": (1 << 32) - 1} | BARE, Detail.BAD_PLAN),
        ({"op": FORGET} | BARE, Detail.BAD_PLAN),
        ({"op": FORGET, "argument": U64} | BARE, Detail.BAD_PLAN),
        ({"op": FORGET, "plan": 1} | BARE, Detail.BAD_FLAGS),
    ],
)
def test_raw_entries(ring: RawSender, fields: dict[str, int], detail: Detail) -> None:
    assert ring.end(**fields) == (JobStatus.INVALID, detail)


def test_raw_tables(ring: RawSender) -> None:
    """Heads and rows that are garbage; the same plan afterwards."""
    assert ring.end(flags=PLAN | TABLE, plan=3, argument=4096, length=100) == (OK, Detail.NONE)
    launch = BARE | {"op": LAUNCH, "plan": 3}
    for table, end in (
        (b"\xff" * 128, (JobStatus.INVALID, Detail.TABLE)),
        ((2).to_bytes(64, "little"), (JobStatus.INVALID, Detail.TABLE)),
        ((1).to_bytes(64, "little") + b"\xff" * 24, (JobStatus.INVALID, Detail.SOURCE_BOUNDS)),
        (
            (1).to_bytes(64, "little") + bytes(8) + b"\xff" * 8 + bytes(8),
            (JobStatus.INVALID, Detail.DESTINATION_BOUNDS),
        ),
        (bytes(128), (OK, Detail.NONE)),
        ((1).to_bytes(64, "little") + bytes(24), (OK, Detail.NONE)),
    ):
        ring.fill(table, 4096)
        assert ring.end(**launch) == end
    assert ring.end(**BARE | {"op": FORGET, "argument": 3}) == (OK, Detail.NONE)
