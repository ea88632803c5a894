# SPDX-License-Identifier: Apache-2.0
"""The blocking SDK against a fake daemon: jobs, counters, and a daemon that fails."""

from __future__ import annotations

import gc
import os
import signal
import struct
import threading
import time
from typing import TYPE_CHECKING

import pytest

import transferd
from transferd.native.client_half import ffi
from transferd.native.entry import ENTRY
from transferd.native.names import Detail, JobStatus

from support.fake_daemon import FakeDaemon
from support.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture
def fake(short_tmp: Path) -> Iterator[FakeDaemon]:
    daemon = FakeDaemon(short_tmp)
    yield daemon
    daemon.close()


@pytest.fixture
def client(fake: FakeDaemon) -> Iterator[transferd.Client]:
    with transferd.Client(fake.address, timeout_s=5) as made:
        yield made


@pytest.fixture
def pair(client: transferd.Client) -> tuple[transferd.Region, transferd.Grant]:
    region = client.alloc(8192)
    return region, region.grant(4096, 4096, imms=range(16))


def test_entry_layout_is_the_abis() -> None:
    entry = ffi.new("struct tfd_entry *")
    ENTRY.pack_into(
        ffi.buffer(entry), 0, 1, 0, 1, 0, *range(5, 13), 19, *range(13, 17), 21, 17, 18, 20
    )
    assert ENTRY.size == ffi.sizeof(entry[0])
    assert (entry.table_offset, entry.table_count) == (15, 16)
    assert (entry.src_stride, entry.dst_stride) == (17, 18)
    assert (entry.op, entry.flags, entry.priority, entry.record, entry.job_id) == (1, 0, 1, 5, 6)
    assert (entry.src_region, entry.src_offset, entry.dst_grant) == (7, 8, 9)
    assert (entry.dst_offset, entry.length, entry.imm) == (10, 11, 12)
    assert (entry.deadline_ns, entry.argument) == (13, 14)
    assert (entry.watcher, entry.fire_at, entry.plan) == (19, 20, 21)
    assert (entry._resv0, entry.trigger, entry.marks) == (0, 0, 0)


def test_write_lands_and_counts(client: transferd.Client, pair: tuple) -> None:
    region, grant = pair
    region.view[:5] = b"hello"
    job = client.write(region[0:5], grant.descriptor, 3, imm=7, priority="latency", deadline_s=5)
    assert job.wait(timeout_s=5) is JobStatus.OK
    assert job.status is JobStatus.OK
    assert job.done()
    client.counter(7).wait(1, timeout_s=5)
    assert bytes(region.view[4099:4104]) == b"hello"
    result = job.result
    assert result is not None
    assert (result.bytes, result.detail, result.path.provider) == (5, "", "libfabric")
    assert result.submitted_ns is not None
    assert result.accepted_ns is not None
    assert result.ended_ns is not None
    assert result.submitted_ns <= result.accepted_ns <= result.ended_ns
    assert str(job.path) == "libfabric, 1 rail"
    assert client.provider == "fake"


def test_imm_and_batch(client: transferd.Client, fake: FakeDaemon, pair: tuple) -> None:
    region, grant = pair
    assert client.imm(grant.descriptor, 3).wait(5) is JobStatus.OK
    # Three times what the ring holds, so it goes in parts.
    jobs = client.submit(
        [
            transferd.Write(src=region[i : i + 1], dst=grant.descriptor, dst_offset=i, imm=4)
            for i in range(48)
        ]
        + [transferd.Imm(dst=grant.descriptor, imm=4)],
        timeout_s=5,
    )
    assert len(jobs) == 49
    assert len({job.id for job in jobs}) == 49
    assert all(job.wait(5) is JobStatus.OK for job in jobs)
    client.counter(4).wait(49, timeout_s=5)
    assert fake.calls.count("OpenDescriptors") == 1
    assert "GetCounter" not in fake.calls  # the grant told their slots
    assert client.submit([]) == []


def test_counter_of_another_immediate_is_asked_for(
    client: transferd.Client, fake: FakeDaemon
) -> None:
    assert client.counter(99).value == 0
    assert client.counter(99) is client.counter(99)
    assert fake.calls.count("GetCounter") == 1
    with pytest.raises(transferd.WaitTimeout, match="stands at 0 of 1"):
        client.counter(99).wait(1, timeout_s=0.01)
    assert issubclass(transferd.WaitTimeout, TimeoutError)


def test_back_pressure_waits_for_room(
    client: transferd.Client, fake: FakeDaemon, pair: tuple
) -> None:
    _, grant = pair
    fake.hold.add(1)
    jobs = [client.imm(grant.descriptor, 1, timeout_s=5) for _ in range(fake.records)]
    with pytest.raises(transferd.WaitTimeout, match="no room") as caught:
        client.imm(grant.descriptor, 1, timeout_s=0.02)
    assert caught.value.reason == "RING_FULL"
    threading.Timer(0.05, fake.release).start()
    more = client.imm(grant.descriptor, 2, timeout_s=5)
    assert more.wait(5) is JobStatus.OK
    assert [job.wait(5) for job in jobs] == [JobStatus.OK] * len(jobs)


def test_dropped_jobs_give_their_records_back(
    client: transferd.Client, fake: FakeDaemon, pair: tuple
) -> None:
    _, grant = pair
    for _ in range(10 * fake.records):
        client.imm(grant.descriptor, 1, timeout_s=5)  # nobody keeps the job
    client.counter(1).wait(10 * fake.records, timeout_s=5)


def test_kept_jobs_block_nobody(client: transferd.Client, fake: FakeDaemon, pair: tuple) -> None:
    _, grant = pair
    jobs = [client.imm(grant.descriptor, 1, timeout_s=5) for _ in range(4 * fake.records)]
    assert {job.wait(5) for job in jobs} == {JobStatus.OK}


def test_cancel_is_a_fence(client: transferd.Client, fake: FakeDaemon, pair: tuple) -> None:
    _, grant = pair
    fake.hold.add(1)
    job = client.imm(grant.descriptor, 1)
    assert job.status is JobStatus.PENDING
    assert job.path is None
    assert job.cancel(timeout_s=5) is JobStatus.CANCELLED
    with pytest.raises(transferd.JobFailed, match="CANCELLED") as caught:
        job.wait()
    assert caught.value.status is JobStatus.CANCELLED
    quick = client.imm(grant.descriptor, 2)
    quick.wait(5)
    assert quick.cancel() is JobStatus.OK


@pytest.mark.parametrize(
    ("status", "detail", "cls"),
    [
        (JobStatus.PEER_LOST, Detail.HEARTBEAT, transferd.PeerLost),
        (JobStatus.INVALID, Detail.DESTINATION_BOUNDS, transferd.InvalidRequest),
        (JobStatus.INVALID, Detail.IMM_RANGE, transferd.AccessDenied),
        (JobStatus.INVALID, Detail.STALE, transferd.StaleDescriptor),
        (JobStatus.DEADLINE, Detail.NONE, transferd.JobFailed),
        (JobStatus.QUOTA, Detail.NONE, transferd.QuotaExceeded),
    ],
)
def test_ends_as_exceptions(
    client: transferd.Client,
    fake: FakeDaemon,
    pair: tuple,
    status: JobStatus,
    detail: Detail,
    cls: type[Exception],
) -> None:
    _, grant = pair
    fake.refuse[5] = (status, detail)
    job = client.imm(grant.descriptor, 5)
    with pytest.raises(cls) as caught:
        job.wait(5)
    assert isinstance(caught.value, transferd.JobFailed)
    assert caught.value.status is status
    assert caught.value.detail == ("" if detail is Detail.NONE else detail.name)
    assert job.status is status


def test_a_lost_destination_is_opened_again(
    client: transferd.Client, fake: FakeDaemon, pair: tuple
) -> None:
    _, grant = pair
    fake.refuse[5] = (JobStatus.PEER_LOST, Detail.CONNECTION)
    job = client.imm(grant.descriptor, 5)
    with pytest.raises(transferd.PeerLost):
        job.wait(5)
    fake.refuse.clear()
    assert client.imm(grant.descriptor, 5).wait(5) is JobStatus.OK
    assert fake.calls.count("OpenDescriptors") == 2
    assert len(fake.closed_handles) == 1


def test_fault_and_acknowledge(client: transferd.Client, fake: FakeDaemon, pair: tuple) -> None:
    _, grant = pair
    counter = client.counter(3)
    threading.Timer(0.02, fake.sessions[0].fault, (3, 2)).start()
    with pytest.raises(transferd.CounterFault) as caught:
        counter.wait(1, timeout_s=5)
    assert (caught.value.imm, caught.value.faults, caught.value.lost) == (3, 1, 2)
    assert (counter.faults, counter.lost) == (1, 2)
    counter.acknowledge()
    client.imm(grant.descriptor, 3)
    counter.wait(1, timeout_s=5)


def test_callbacks(
    client: transferd.Client, fake: FakeDaemon, pair: tuple, caplog: pytest.LogCaptureFixture
) -> None:
    _, grant = pair
    fake.hold.add(1)
    called: list[transferd.Job] = []
    done = threading.Event()

    def fail(job: transferd.Job) -> None:
        raise RuntimeError("on purpose")

    def note(job: transferd.Job) -> None:
        called.append(job)
        if len(called) == len(jobs):
            done.set()

    jobs = [client.imm(grant.descriptor, 1) for _ in range(5)]
    for job in jobs:
        job.add_done_callback(fail)
        job.add_done_callback(note)
    assert not called
    fake.release()
    assert done.wait(5)
    # Once each; the order is that in which the ends were seen.
    assert sorted(job.id for job in called) == sorted(job.id for job in jobs)
    # A job may end between the looks of its two callbacks.
    eventually(lambda: len(caplog.records) == 5, "what they raised is logged")
    jobs[0].add_done_callback(called.append)  # at once
    assert called[-1] is jobs[0]
    assert called[-1].status is JobStatus.OK
    deadline = time.monotonic() + 5
    while fake.sessions[0].header.event_waiters and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not fake.sessions[0].header.event_waiters


@pytest.mark.parametrize("how", ["vanish", "end_sessions"])
def test_daemon_gone(client: transferd.Client, fake: FakeDaemon, pair: tuple, how: str) -> None:
    region, grant = pair
    fake.hold.add(1)
    job = client.imm(grant.descriptor, 1)
    ended = client.imm(grant.descriptor, 2)
    client.counter(2).wait(1, timeout_s=5)
    called = threading.Event()
    job.add_done_callback(lambda _: called.set())
    caught: list[BaseException] = []

    def wait() -> None:
        try:
            client.counter(9).wait(1)
        except transferd.Unavailable as error:
            caught.append(error)

    waiter = threading.Thread(target=wait)
    waiter.start()
    time.sleep(0.05)
    started = time.monotonic()
    getattr(fake, how)()
    with pytest.raises(transferd.Unavailable):
        job.wait()
    waiter.join(5)
    assert time.monotonic() - started < 1
    assert called.wait(5)
    assert caught
    assert ended.wait() is JobStatus.OK
    with pytest.raises(transferd.Unavailable) as error:
        client.write(region, grant.descriptor, imm=1)
    if how == "end_sessions":
        assert error.value.reason == "KICKED"
        assert "an operator ended it" in str(error.value)
    with pytest.raises(transferd.Unavailable):
        client.alloc(4096)
    assert isinstance(error.value, ConnectionError)


def test_close(fake: FakeDaemon) -> None:
    client = transferd.Client(fake.address)
    region = client.alloc(4096)
    view = region.view
    grant = region.grant(imms=[1])
    fake.hold.add(1)
    job = client.imm(grant.descriptor, 1)
    caught: list[BaseException] = []

    def wait() -> None:
        try:
            job.wait()
        except transferd.Unavailable as error:
            caught.append(error)

    waiter = threading.Thread(target=wait)
    waiter.start()
    time.sleep(0.05)
    client.close()
    client.close()
    waiter.join(5)
    assert "closed" in str(caught[0])
    assert fake.sessions[0].detached
    view[0] = 1  # the memory outlives the session
    region.close()
    for call in (
        lambda: client.alloc(4096),
        lambda: client.imm(grant.descriptor, 1),
        lambda: client.write(region, grant.descriptor, imm=1),
        lambda: client.warm(b"new"),
        lambda: client.counter(1).value,
        lambda: job.status,
    ):
        with pytest.raises(transferd.TransferdError):
            call()


def test_sessions_leave_nothing_behind(fake: FakeDaemon) -> None:
    def state() -> tuple[int, int]:
        gc.collect()
        return threading.active_count(), len(os.listdir("/proc/self/fd"))

    def cycle() -> None:
        with transferd.Client(fake.address) as client:
            region = client.alloc(4096)
            grant = region.grant(imms=[1])
            client.imm(grant.descriptor, 1).add_done_callback(lambda _: None)

    cycle()
    before = [len(s.regions) for s in fake.sessions]
    threads, _ = state()
    for _ in range(5):
        cycle()
    after_threads, _ = state()
    assert after_threads - threads <= 2 * 5  # the fake's own, two a session
    assert before


def test_unclosed_client_warns(fake: FakeDaemon) -> None:
    clients = [transferd.Client(fake.address)]
    with pytest.warns(ResourceWarning, match="not closed"):
        clients.clear()


def test_forked_child_gets_a_clear_error(client: transferd.Client, pair: tuple) -> None:
    region, grant = pair
    job = client.imm(grant.descriptor, 1)
    child = os.fork()
    if not child:
        status = 1
        try:
            for call in (
                lambda: client.imm(grant.descriptor, 1),
                lambda: client.write(region, grant.descriptor, imm=1),
                lambda: client.alloc(4096),
                lambda: client.counter(1).wait(1),
                lambda: region.grant(),
                lambda: job.wait(),
            ):
                with pytest.raises(transferd.Unavailable, match="fork"):
                    call()
            client.close()
            status = 0
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert client.imm(grant.descriptor, 1).wait(5) is JobStatus.OK


def test_signals_reach_a_waiting_thread(client: transferd.Client) -> None:
    class Told(Exception):
        pass

    def handler(*_: object) -> None:
        raise Told

    counter = client.counter(1)
    old = signal.signal(signal.SIGALRM, handler)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        with pytest.raises(Told):
            counter.wait(1, timeout_s=10)
        signal.signal(signal.SIGALRM, lambda *_: None)
        signal.setitimer(signal.ITIMER_REAL, 0.02)
        with pytest.raises(transferd.WaitTimeout):
            counter.wait(1, timeout_s=0.1)
    finally:
        signal.signal(signal.SIGALRM, old)


def test_several_threads(client: transferd.Client, pair: tuple) -> None:
    region, grant = pair
    failures: list[BaseException] = []

    def work(number: int) -> None:
        try:
            for _ in range(50):
                job = client.write(
                    region[number : number + 1], grant.descriptor, number, imm=number
                )
                assert job.wait(10) is JobStatus.OK
            client.counter(number).wait(50, timeout_s=10)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_refused_attach_and_no_daemon(fake: FakeDaemon, short_tmp: Path) -> None:
    with pytest.raises(transferd.AccessDenied, match="not you"):
        transferd.Client(fake.address, name="refused")
    with pytest.raises(transferd.Unavailable, match="transferd serve"):
        transferd.Client(f"unix://{short_tmp}/nobody.sock")
    with pytest.raises(transferd.InvalidRequest, match="shared memory"):
        transferd.Client("localhost:1", shared_memory=True)
    with pytest.raises(transferd.InvalidRequest, match="64 bytes"):
        transferd.Client(fake.address, name="x" * 65)


@pytest.mark.parametrize(
    "arguments",
    [
        {"imm": -1},
        {"imm": 1 << 20},
        {"imm": 1.0},
        {"imm": 1, "dst_offset": -1},
        {"imm": 1, "dst_offset": 1 << 64},
        {"imm": 1, "priority": "urgent"},
        {"imm": 1, "priority": []},
        {"imm": 1, "deadline_s": 0},
        {"imm": 1, "deadline_s": -1.0},
        {"imm": 1, "dst": "text"},
        {"imm": 1, "dst": b"unknown"},
    ],
)
def test_bad_arguments(client: transferd.Client, pair: tuple, arguments: dict) -> None:
    region, grant = pair
    with pytest.raises(transferd.InvalidRequest):
        client.write(**{"src": region, "dst": grant.descriptor, **arguments})
    with pytest.raises(transferd.InvalidRequest):
        client.submit([transferd.Write(**{"src": region, "dst": grant.descriptor, **arguments})])


def test_imm_is_required(client: transferd.Client, pair: tuple) -> None:
    region, grant = pair
    with pytest.raises(TypeError, match="imm"):
        client.write(region, grant.descriptor)  # type: ignore[call-arg]


def test_descriptor_as_other_bytes(client: transferd.Client, pair: tuple) -> None:
    region, grant = pair
    for descriptor in (bytearray(grant.descriptor), memoryview(grant.descriptor)):
        assert client.write(region[0:1], descriptor, imm=1).wait(5) is JobStatus.OK  # type: ignore[arg-type]
        assert client.imm(descriptor, 1).wait(5) is JobStatus.OK  # type: ignore[arg-type]


def test_deadline_is_absolute_in_the_ring(
    client: transferd.Client, fake: FakeDaemon, pair: tuple
) -> None:
    region, grant = pair
    before = time.monotonic_ns()
    client.write(region[0:1], grant.descriptor, imm=1, deadline_s=2).wait(5)
    deadline = fake.sessions[0].entry[0].deadline_ns
    assert before + 2_000_000_000 <= deadline <= time.monotonic_ns() + 2_000_000_000
    client.submit([transferd.Imm(dst=grant.descriptor, imm=1, deadline_s=3)])[0].wait(5)
    deadline = fake.sessions[0].entry[1].deadline_ns
    assert before + 3_000_000_000 <= deadline <= time.monotonic_ns() + 3_000_000_000
    assert struct.calcsize("Q") == 8
