# SPDX-License-Identifier: Apache-2.0
"""Operations on several rails, on sizes that do not divide, and with a member that dies."""

from __future__ import annotations

import contextlib
import time
from typing import TYPE_CHECKING

import numpy as np
import pytest

import transferd
from transferd.native.names import JobStatus

from support import netns
from support.grpc_session import tenants

if TYPE_CHECKING:
    import random
    from collections.abc import Iterator
    from pathlib import Path

    from conftest import MakeDaemon

    from support.daemon import DaemonProcess

pytestmark = [pytest.mark.slow, pytest.mark.chaos]

WHY_NOT = netns.missing()
WAIT_S = 20.0
LENGTH = 8 << 20
OK = JobStatus.OK


@contextlib.contextmanager
def hosts(directory: Path, rails: int) -> Iterator[list[DaemonProcess]]:
    """Runs daemons on two hosts with so many rails each."""
    with netns.network() as network, contextlib.ExitStack() as stack:
        daemons = []
        for name in "ab":
            (directory / name).mkdir()
            daemon = network.host(rails).daemon(directory / name, directory / "tls")
            daemons.append(stack.enter_context(daemon))
        yield daemons


@pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT)
@pytest.mark.parametrize("rails", [2, 4])
def test_sizes_that_do_not_divide_over_the_rails(
    short_tmp: Path, seeded: random.Random, rails: int
) -> None:
    with (
        hosts(short_tmp, rails) as (near, far),
        transferd.Client(near.socket) as sender,
        transferd.Client(far.socket) as receiver,
    ):
        source, target = sender.alloc(LENGTH), receiver.alloc(LENGTH)
        source.view[:] = seeded.randbytes(LENGTH)
        grant = target.grant(imms=range(8), rights={"read", "write"})
        dst, back = grant.descriptor, sender.alloc(LENGTH)
        group = sender.peer_group([dst] * 3)
        count, used = 0, set()
        for size in (1, 7, 16_385, (256 << 10) + 1, (3 << 20) - 1):
            target.view[:] = bytes(LENGTH)
            jobs = [
                sender.write(source[:size], dst, imm=1, exact=True),
                sender.scatter(
                    source, [(i, i, (4 + i) << 20, size // 3) for i in range(3)], imm=1,
                    group=group,
                ),
                sender.barrier(group, imm=1),
            ]  # fmt: skip
            count += 1 + 3 + 3
            assert {job.wait(WAIT_S) for job in jobs} == {OK}
            receiver.counter(1).wait(count, WAIT_S)
            assert receiver.counter(1).read() == (count, 0, 0, 0)
            assert target.view[:size] == source.view[:size], size
            assert not any(target.view[size : size + 64])
            for i in range(3):
                at = (4 + i) << 20
                assert target.view[at : at + size // 3] == source.view[i : i + size // 3], size
            assert sender.read(dst, back[:size]).wait(WAIT_S) is OK
            assert back.view[:size] == target.view[:size], size
            used |= {job.path.rails for job in jobs if job.path is not None}
        assert max(used) == rails
        # An odd number of pages, of an odd size; one page; one byte.
        for pages, size in ((1001, 3001), (1, 16_385), (3, 1)):
            target.view[:] = bytes(LENGTH)
            order = np.array(seeded.sample(range(pages), pages), dtype=np.int32)
            job = sender.write_pages(
                source, np.arange(pages), dst, order, size, imm=2, dst_stride=size + 1
            )
            assert job.wait(WAIT_S) is OK
            for i, at in enumerate(order.tolist()):
                there = target.view[at * (size + 1) :][: size + 1]
                assert there[:size] == source.view[i * size :][:size]
                assert there[size] == 0
        receiver.counter(2).wait(1001 + 1 + 3, WAIT_S)
        assert receiver.counter(2).read() == (1001 + 1 + 3, 0, 0, 0)


@pytest.mark.parametrize("shared_memory", [True, False], ids=["ring", "grpc"])
def test_a_group_with_a_dead_member(make_daemon: MakeDaemon, shared_memory: bool) -> None:
    near, far, doomed = (make_daemon(tenants=tenants()) for _ in range(3))
    with (
        transferd.Client(near.socket, shared_memory=shared_memory) as sender,
        transferd.Client(far.socket) as living,
        transferd.Client(doomed.socket) as dying,
    ):
        length = 32 << 20
        source = sender.alloc(length)
        target = living.alloc(length)
        kept = target.grant(imms=range(4)).descriptor
        lost = dying.alloc(length).grant(imms=range(4)).descriptor
        group = sender.peer_group([kept, lost])
        assert sender.barrier(group, imm=1).wait(WAIT_S) is OK
        living.counter(1).wait(1, WAIT_S)
        source.view[:8] = b"scatter!"
        job = sender.scatter(source, [(0, 0, 0, 8), (1, 0, 0, length)], imm=2, group=group)
        doomed.kill()
        with contextlib.suppress(transferd.PeerLost):
            job.wait(WAIT_S)
        assert job.status in (OK, JobStatus.PEER_LOST)
        # The living member has its part, whatever became of the other.
        living.counter(2).wait(1, WAIT_S)
        assert bytes(target.view[:8]) == b"scatter!"
        deadline = time.monotonic() + WAIT_S
        with contextlib.suppress(transferd.PeerLost):
            while time.monotonic() < deadline:  # until its death is known
                sender.barrier(group, imm=1).wait(WAIT_S)
        sent = living.counter(1).value
        for _ in range(3):
            with pytest.raises(transferd.PeerLost):
                sender.barrier(group, imm=1).wait(WAIT_S)
            with pytest.raises(transferd.PeerLost):
                sender.scatter(source, [(0, 0, 0, 1), (1, 0, 0, 1)], imm=1, group=group).wait(
                    WAIT_S
                )
        # Nothing of those was sent; without the dead one the group works, as it was.
        assert sender.barrier([kept], imm=1).wait(WAIT_S) is OK
        living.counter(1).wait(sent + 1, WAIT_S)
        assert living.counter(1).read() == (sent + 1, 0, 0, 0)
        doomed.restart()
        with transferd.Client(doomed.socket) as reborn:
            fresh = reborn.alloc(4096).grant(imms=range(4)).descriptor
            assert sender.barrier(sender.peer_group([kept, fresh]), imm=3).wait(WAIT_S) is OK
            reborn.counter(3).wait(1, WAIT_S)


@pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT)
def test_a_rail_that_dies_under_pages_and_scatters(short_tmp: Path, seeded: random.Random) -> None:
    with (
        netns.network() as network,
        contextlib.ExitStack() as stack,
    ):
        made = [network.host(2, rate="400mbit") for _ in range(2)]
        daemons = []
        for name, host in zip("ab", made, strict=True):
            (short_tmp / name).mkdir()
            daemons.append(stack.enter_context(host.daemon(short_tmp / name, short_tmp / "tls")))
        near, far = daemons
        sender = stack.enter_context(transferd.Client(near.socket))
        receiver = stack.enter_context(transferd.Client(far.socket))
        source, target = sender.alloc(LENGTH), receiver.alloc(LENGTH)
        source.view[:] = seeded.randbytes(LENGTH)
        dst = target.grant(imms=range(4)).descriptor
        sender.warm(dst)
        index = np.arange(LENGTH >> 12, dtype=np.int32)
        jobs = [sender.write_pages(source, index, dst, index, 4096, imm=1) for _ in range(8)]
        jobs += [sender.scatter(source, [(dst, 0, 0, LENGTH // 2)] * 2, imm=1) for _ in range(4)]
        netns.run(f"ip netns exec {made[0].namespace} ip link set rail1 down")
        for job in jobs:
            assert job.wait(60) is OK
        receiver.counter(1).wait(8 * len(index) + 8, WAIT_S)
        assert receiver.counter(1).read() == (8 * len(index) + 8, 0, 0, 0)
        assert target.view == source.view
