# SPDX-License-Identifier: Apache-2.0
"""Helpers of GPUs that die, hang or lose their GPU, and clients that die meanwhile."""

from __future__ import annotations

import contextlib
import os
import signal
from typing import TYPE_CHECKING

import psutil
import pytest

import transferd
from transferd.native.names import JobStatus

from support import cuda_peer
from support.bystander import Bystander
from support.daemon import stopped
from support.softcuda import MIB, OUT_OF_MEMORY, SoftBuffer, mapped_by
from support.staged import faults_of, gpus, helper_pid, soft_driver, staged_pair
from support.waiting import WAIT_S, eventually

if TYPE_CHECKING:
    import random
    from collections.abc import Iterator, Sequence

    from support.daemon import DaemonProcess
    from support.softcuda import SoftCuda

    Pair = tuple[DaemonProcess, DaemonProcess]

pytestmark = [pytest.mark.slow, pytest.mark.chaos]

LENGTH, PIECE = 8 * MIB, MIB
JOBS = 40
OK = JobStatus.OK
ILLEGAL_ADDRESS = 700
SLOW_US = 20_000  # of each copy: jobs are under way for long enough to be met there


@pytest.fixture(scope="module")
def soft() -> Iterator[SoftCuda]:
    with soft_driver() as made:
        yield made


@pytest.fixture
def pair(request: pytest.FixtureRequest) -> Iterator[Pair]:
    with staged_pair() as made:
        request.node.transferd_daemons = list(made)
        yield made


@pytest.fixture
def patient_pair(request: pytest.FixtureRequest) -> Iterator[Pair]:
    """Neither gives the other up."""
    bounds = {"peer_call": 60, "revoke": 60, "quiet": 60}
    with staged_pair(timeouts=bounds, heartbeat={"interval": 1, "timeout": 600}) as made:
        request.node.transferd_daemons = list(made)
        yield made


class Scene:
    """GPU memory at both daemons, and jobs between them."""

    def __init__(self, soft: SoftCuda, pair: Pair, stack: contextlib.ExitStack) -> None:
        self.sender = stack.enter_context(transferd.Client(pair[0].socket, name="sender"))
        self.receiver = stack.enter_context(transferd.Client(pair[1].socket, name="receiver"))
        self.here, self.there = SoftBuffer(soft, LENGTH), SoftBuffer(soft, LENGTH)
        self.source = self.sender.register(self.here)
        self.there_region = self.receiver.register(self.there)
        self.grant = self.there_region.grant(imms=range(8))

    def write(self, at: int = 0, imm: int = 1) -> transferd.Job:
        part = self.source[at : at + PIECE]
        return self.sender.write(part, self.grant.descriptor, at, imm=imm)

    def flood(self) -> list[transferd.Job]:
        return [self.write(i * PIECE % LENGTH) for i in range(JOBS)]

    def works(self, seeded: random.Random) -> None:
        """A write gets through, soon, with its bytes and its count."""
        counter = self.receiver.counter(2)

        def goes() -> bool:
            counter.acknowledge()
            before = counter.value
            self.here.view[:PIECE] = seeded.randbytes(PIECE)
            try:
                if self.write(imm=2).wait(WAIT_S) is not OK:
                    return False
            except transferd.TransferdError:
                return False
            counter.wait(before + 1, WAIT_S)
            assert counter.value == before + 1
            assert self.there.view[:PIECE] == self.here.view[:PIECE]
            return True

        eventually(goes, "memory of GPUs is staged again")


@pytest.fixture
def scene(soft: SoftCuda, pair: Pair) -> Iterator[Scene]:
    with contextlib.ExitStack() as stack:
        yield Scene(soft, pair, stack)


def ends(jobs: list[transferd.Job]) -> list[JobStatus]:
    """How all of them ended: none is forgotten."""
    found = []
    for job in jobs:
        try:
            found.append(job.wait(WAIT_S))
        except transferd.JobFailed as failure:
            found.append(JobStatus(failure.status))
    return found


def slowly(daemons: Sequence[DaemonProcess]) -> None:
    for daemon in daemons:
        (faults_of(daemon).directory / "slow").write_text(str(SLOW_US))


def fast_again(pair: Pair) -> None:
    for daemon in pair:
        faults_of(daemon).clear("slow")


@pytest.mark.parametrize("side", [0, 1], ids=["sender's", "receiver's"])
@pytest.mark.parametrize("how", ["killed", "frozen", "lost"])
def test_a_helper_that_ends_costs_what_was_under_way_there(
    scene: Scene, pair: Pair, side: int, how: str, seeded: random.Random
) -> None:
    scene.works(seeded)
    daemon, pids = pair[side], [one.pid for one in pair]
    before = helper_pid(daemon)
    faults = faults_of(daemon)
    faults.set("hold", 1)
    with Bystander(*pair) as bystander:
        jobs = scene.flood()
        eventually(lambda: "hold" not in faults.left(), "a copy is under way")
        if how == "lost":
            faults.set("context", ILLEGAL_ADDRESS)
        else:
            os.kill(before, signal.SIGKILL if how == "killed" else signal.SIGSTOP)
        eventually(lambda: gpus(daemon)[0].pid != before, "the daemon has ended it")
        found = ends(jobs)
        rounds = bystander.rounds
        eventually(lambda: bystander.rounds > rounds + 1, "others go on")
    failed = JobStatus.REMOTE_ACCESS if side else JobStatus.LOCAL_ACCESS
    assert set(found) == {OK, failed}
    assert len(found) == JOBS
    scene.works(seeded)
    (gpu,) = gpus(daemon)
    assert gpu.pid != before
    assert gpu.restarts >= 1
    if how == "lost":
        assert "CUDA_ERROR_ILLEGAL_ADDRESS" in gpu.reason
        assert not faults.left()
    assert [one.pid for one in pair] == pids
    assert all(one.running for one in pair)
    assert not any("connection broke" in one.log() for one in pair)


def test_no_room_for_the_pool(scene: Scene, pair: Pair, seeded: random.Random) -> None:
    faults = faults_of(pair[0])
    faults.set("cuMemHostRegister_v2", OUT_OF_MEMORY, always=True)
    with pytest.raises(transferd.JobFailed):
        scene.write().wait(WAIT_S)
    eventually(lambda: "gpu.staging_bytes" in pair[0].log(), "it says what to do")
    plain, target = scene.sender.alloc(PIECE), scene.receiver.alloc(PIECE)
    descriptor = target.grant(imms=[3]).descriptor
    assert scene.sender.write(plain, descriptor, imm=3).wait(WAIT_S) is OK
    faults.clear("cuMemHostRegister_v2")
    scene.works(seeded)


def test_a_fence_waits_for_a_helper_that_stands_still(
    scene: Scene, pair: Pair, seeded: random.Random
) -> None:
    """Until that has been ended it may write: only then the owner is told that it does not."""
    scene.works(seeded)
    pid = helper_pid(pair[1])
    faults = faults_of(pair[1])
    faults.set("hold", 1)
    jobs = scene.flood()
    eventually(lambda: "hold" not in faults.left(), "a copy is under way")
    scene.grant.revoke()
    assert not psutil.pid_exists(pid)
    before = bytes(scene.there.view)
    assert len(ends(jobs)) == JOBS
    assert bytes(scene.there.view) == before
    scene.grant = scene.there_region.grant(imms=range(8))
    scene.works(seeded)


@pytest.mark.parametrize("kind", ["idle", "under way"])
def test_memory_of_a_killed_receiver_is_let_go_of(
    soft: SoftCuda, pair: Pair, kind: str, seeded: random.Random
) -> None:
    with contextlib.ExitStack() as stack:
        scene = Scene(soft, pair, stack)
        scene.works(seeded)
        pid = helper_pid(pair[1])
        held = mapped_by(pid)
        with cuda_peer.running(pair[1].socket, "soft", LENGTH) as peer:
            descriptor = peer.descriptor
            part = scene.source[0:PIECE]
            assert scene.sender.write(part, descriptor, imm=1).wait(WAIT_S) is OK
            assert peer.bytes_at(0, 64) == bytes(scene.here.view[:64])
            assert mapped_by(pid) == held + 1
            jobs = []
            if kind == "under way":
                slowly(pair)
                jobs = [scene.sender.write(part, descriptor, imm=1) for _ in range(JOBS)]
            peer.process.kill()
            peer.process.wait()
            fast_again(pair)
            eventually(lambda: mapped_by(pid) == held, "the helper has let go of its memory")
            assert len(ends(jobs)) == len(jobs)
        scene.works(seeded)
        assert helper_pid(pair[1]) == pid, "it is the client's death alone"


def test_memory_of_a_killed_client_waits_for_no_peer(
    soft: SoftCuda, patient_pair: Pair, seeded: random.Random
) -> None:
    """A peer daemon that stands still holds up the end of the session, and not its memory."""
    near, far = patient_pair
    with contextlib.ExitStack() as stack:
        scene = Scene(soft, patient_pair, stack)
        scene.works(seeded)
        pid = helper_pid(far)
        held = mapped_by(pid)
        with cuda_peer.running(far.socket, "soft", LENGTH) as peer:
            part = scene.source[0:PIECE]
            assert scene.sender.write(part, peer.descriptor, imm=1).wait(WAIT_S) is OK
            assert mapped_by(pid) == held + 1
            with stopped(near):
                peer.process.kill()
                eventually(lambda: mapped_by(pid) == held, "the helper has let go of its memory")
                assert far.log().count("session closed") == 0
        eventually(lambda: "session closed" in far.log(), "and the session has ended")
        scene.works(seeded)
        assert helper_pid(far) == pid


def test_a_client_that_ends_while_copies_run(
    soft: SoftCuda, pair: Pair, seeded: random.Random
) -> None:
    with contextlib.ExitStack() as stack:
        scene = Scene(soft, pair, stack)
        scene.works(seeded)
        slowly(pair)
        pid = helper_pid(pair[0])
        held = mapped_by(pid)
        with transferd.Client(pair[0].socket) as leaving:
            buffer = SoftBuffer(soft, LENGTH)
            region = leaving.register(buffer)
            jobs = [
                leaving.write(region[0:PIECE], scene.grant.descriptor, imm=3) for _ in range(JOBS)
            ]
            eventually(lambda: any(job.done() for job in jobs), "some are through")
            fast_again(pair)
        eventually(lambda: mapped_by(pid) == held, "the helper has let go of its memory")
        buffer.free()
        scene.works(seeded)
        assert helper_pid(pair[0]) == pid


def test_helpers_end_with_their_daemon(soft: SoftCuda, pair: Pair, seeded: random.Random) -> None:
    with contextlib.ExitStack() as stack:
        Scene(soft, pair, stack).works(seeded)
        pids = [helper_pid(daemon) for daemon in pair]
    pair[0].kill()
    eventually(lambda: not psutil.pid_exists(pids[0]), "it ends with a daemon that is killed")
    pair[1].stop()
    assert not psutil.pid_exists(pids[1])
