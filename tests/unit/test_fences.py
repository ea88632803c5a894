# SPDX-License-Identifier: Apache-2.0
"""Fences on single immediates between daemons: real control plane, fake data planes."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest

from transferd.daemon import errors
from transferd.daemon.grant import FENCES_MAX, IMM_RANGES_MAX, check_fence
from transferd.daemon.plane import Detail, EventType
from transferd.daemon.wire import BATCH_MAX

from support.hosts import Host, Network, eventually

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from transferd.daemon.peer import Open
    from transferd.daemon.session import Session

SEVEN = (range(7, 8),)


@pytest.fixture
async def network() -> AsyncIterator[Network]:
    net = Network()
    yield net
    for host in list(net.hosts.values()):
        await host.aclose()
        host.assert_nothing_left()


@pytest.fixture
def near(network: Network) -> Host:
    return Host(network, 7001)


@pytest.fixture
def far(network: Network) -> Host:
    return Host(network, 7002)


def fences(host: Host, session: Session, opened: Open) -> dict[int, tuple[range, ...]]:
    """The native fences of an open, by number."""
    return host.plane.sessions[session.handle].opens[opened.handle].fences


async def test_every_open_is_fenced_and_the_grant_lives_on(
    network: Network, near: Host, far: Host
) -> None:
    grant, descriptor = await far.grant(await far.session(), imms=16)
    other = Host(network, 7003)
    opened = []
    for host in (near, near, other):
        session = await host.session()
        opened.append((host, session, (await host.open(session, descriptor))[0]))
    await far.owner.fence_grant(grant, (range(2, 4), range(7, 8)))
    assert network.calls["fence_grants"] == 2
    for host, session, one in opened:
        assert list(fences(host, session, one).values()) == [(range(2, 4), range(7, 8))]
        assert one.live
    assert set(grant.openers) == {far.peer(near), far.peer(other)}
    assert len(await near.open(await near.session(), descriptor)) == 1


async def test_own_sessions_are_fenced_without_a_call(network: Network, near: Host) -> None:
    grant, descriptor = await near.grant(await near.session(), imms=8)
    sender = await near.session()
    (opened,) = await near.open(sender, descriptor)
    await near.owner.fence_grant(grant, SEVEN)
    assert list(fences(near, sender, opened).values()) == [SEVEN]
    assert not network.calls


async def test_two_at_once_are_answered_each_by_its_own(near: Host, far: Host) -> None:
    grant, descriptor = await far.grant(await far.session(), imms=16)
    sender = await near.session()
    (opened,) = await near.open(sender, descriptor)
    near.plane.busy_opens.add(opened.handle)
    waits = [
        asyncio.ensure_future(far.owner.fence_grant(grant, (range(imm, imm + 1),)))
        for imm in (7, 9)
    ]
    native = fences(near, sender, opened)
    await eventually(lambda: len(native) == 2)
    by_imm = {imms[0].start: number for number, imms in native.items()}
    near.plane.fence_quiet(sender.handle, opened.handle, by_imm[9])
    await waits[1]
    assert not waits[0].done()
    near.plane.fence_quiet(sender.handle, opened.handle, by_imm[7])
    await waits[0]


async def test_a_stream_that_copies_on_is_told_and_nobody_is_cut_off(near: Host) -> None:
    grant, descriptor = await near.grant(await near.session(), imms=8)
    sender = await near.session()
    (opened,) = await near.open(sender, descriptor)
    near.plane.busy_opens.add(opened.handle)
    fencing = asyncio.ensure_future(near.owner.fence_grant(grant, SEVEN))
    native = fences(near, sender, opened)
    await eventually(lambda: len(native) == 1)
    (number,) = native
    near.plane.fence_quiet(sender.handle, opened.handle, number, Detail.STILL_COPIED)
    with pytest.raises(errors.Conflict) as caught:
        await fencing
    assert caught.value.reason == "STILL_COPIED"
    assert opened.live


async def test_several_grants_take_one_call_of_each_opener(
    network: Network, near: Host, far: Host
) -> None:
    receiver = await far.session()
    made = [await far.grant(receiver, imms=16) for _ in range(3)]
    other = Host(network, 7003)
    opened = []
    for host, descriptors in ((near, [d for _, d in made]), (other, [made[2][1]])):
        session = await host.session()
        opened.append((host, session, await host.open(session, *descriptors)))
    imms = {grant: (range(n, n + 1),) for n, (grant, _) in enumerate(made)}
    assert await far.owner.fence_grants(imms) == {}
    assert network.calls["fence_grants"] == 2
    assert [
        [list(fences(host, session, one).values()) for one in opens]
        for host, session, opens in opened
    ] == [[[(range(n, n + 1),)] for n in range(3)], [[(range(2, 3),)]]]


async def test_each_of_several_grants_is_told_apart(near: Host) -> None:
    receiver, sender = await near.session(), await near.session()
    made = [await near.grant(receiver, imms=8) for _ in range(3)]
    (quiet, over, copied) = (grant for grant, _ in made)
    opened = await near.open(sender, *(descriptor for _, descriptor in made))
    busy = opened[2]
    near.plane.busy_opens.add(busy.handle)
    await near.owner.end_grants([over])
    fencing = asyncio.ensure_future(
        near.owner.fence_grants({grant: SEVEN for grant in (quiet, over, copied)})
    )
    native = fences(near, sender, busy)
    await eventually(lambda: len(native) == 1)
    (number,) = native
    near.plane.fence_quiet(sender.handle, busy.handle, number, Detail.STILL_COPIED)
    failed = await fencing
    assert {grant: error.reason for grant, error in failed.items()} == {
        over: "GRANT_REVOKED",
        copied: "STILL_COPIED",
    }


async def test_fences_of_the_same_grants_in_any_order_do_not_wait_in_a_circle(
    near: Host, far: Host
) -> None:
    receiver, sender = await far.session(), await near.session()
    made = [await far.grant(receiver, imms=8) for _ in range(2)]
    opened = await near.open(sender, *(descriptor for _, descriptor in made))
    near.plane.busy_opens.update(one.handle for one in opened)
    (first, _), (second, _) = made
    orders = [{first: SEVEN, second: SEVEN}, {second: SEVEN, first: SEVEN}] * FENCES_MAX
    waits = [asyncio.ensure_future(far.owner.fence_grants(order)) for order in orders]
    native = [fences(near, sender, one) for one in opened]
    await eventually(lambda: [len(each) for each in native] == [FENCES_MAX] * 2)
    near.plane.busy_opens.clear()  # the later ones find nothing in flight
    for one, numbers in zip(opened, native, strict=True):
        for number in list(numbers):
            near.plane.fence_quiet(sender.handle, one.handle, number)
    assert await asyncio.gather(*waits) == [{}] * len(orders)


async def test_more_than_the_bound_wait_for_their_turn(near: Host, far: Host) -> None:
    grant, descriptor = await far.grant(await far.session(), imms=16)
    sender = await near.session()
    (opened,) = await near.open(sender, descriptor)
    near.plane.busy_opens.add(opened.handle)
    waits = [
        asyncio.ensure_future(far.owner.fence_grant(grant, SEVEN)) for _ in range(FENCES_MAX + 2)
    ]
    native = fences(near, sender, opened)
    await eventually(lambda: len(native) == FENCES_MAX)
    await asyncio.sleep(0.01)
    assert len(native) == FENCES_MAX
    near.plane.busy_opens.clear()  # the later ones find nothing in flight
    for number in list(native):
        near.plane.fence_quiet(sender.handle, opened.handle, number)
    await asyncio.gather(*waits)


async def test_losses_are_told_before_the_answer(network: Network, near: Host, far: Host) -> None:
    receiver = await far.session()
    grant, descriptor = await far.grant(receiver, imms=8)
    sender = await near.session()
    (opened,) = await near.open(sender, descriptor)
    gate = network.hold("report_loss")
    near.plane.tell(EventType.LOST, opened.handle, session=sender.handle, imm=7, count=3)
    fencing = asyncio.ensure_future(far.owner.fence_grant(grant, SEVEN))
    await eventually(lambda: network.calls["report_loss"] == 1)
    await asyncio.sleep(0.01)
    assert not fencing.done()
    gate.set()
    await fencing
    assert far.plane.counter_read(receiver.handle, 7).lost == 3


async def test_later_losses_are_not_waited_for(network: Network, near: Host, far: Host) -> None:
    """A session whose jobs fail all the time must not hold up the fences of others."""
    grant, descriptor = await far.grant(await far.session(), imms=8)
    sender = await near.session()
    (opened,) = await near.open(sender, descriptor)

    def lose(imm: int) -> None:
        near.plane.tell(EventType.LOST, opened.handle, session=sender.handle, imm=imm, count=1)

    report, done = far.owner.report_loss, asyncio.Event()

    def losing_more(*arguments: object) -> None:
        report(*arguments)  # type: ignore[arg-type]
        if not done.is_set():
            lose(1)

    far.owner.report_loss = losing_more  # type: ignore[method-assign, assignment]
    lose(7)
    await eventually(lambda: network.calls["report_loss"] > 3)
    await far.owner.fence_grant(grant, SEVEN)
    assert near.peer(far).state == "CONNECTED"
    done.set()
    await eventually(lambda: near.peer(far).reporting is None)


async def test_many_losses_go_in_batches(network: Network, near: Host, far: Host) -> None:
    receiver = await far.session()
    grant, descriptor = await far.grant(receiver, imms=4)
    await near.open(await near.session(), descriptor)
    peer = near.peer(far)
    for number in range(2 * BATCH_MAX):  # of grants that are gone, and then of this one
        peer.losses[(1 << 40) + number, 0] = (1, 0)
    peer.losses[grant.grant_id, 3] = (5, 0)
    near.opener._report(peer)
    await near.opener.flush_losses(peer)
    assert network.calls["report_loss"] == 3
    assert far.plane.counter_read(receiver.handle, 3).lost == 5


async def test_deaf_opener_is_lost_and_nobody_else(network: Network, near: Host, far: Host) -> None:
    receiver = await far.session()
    grant, descriptor = await far.grant(receiver, imms=8)
    sender = await near.session()
    (opened,) = await near.open(sender, descriptor)
    other = Host(network, 7003)
    other_session = await other.session()
    (kept,) = await other.open(other_session, descriptor)
    near.plane.busy_opens.add(opened.handle)  # its last job never ends
    await far.owner.fence_grant(grant, SEVEN)
    assert list(grant.openers) == [far.peer(other)]
    assert kept.live
    assert far.faults(receiver, 0) == 1
    assert [one for one, outgoing in far.plane.conns.items() if not outgoing] == [
        incoming.conn for incoming in far.peer(other).incoming.values()
    ]
    (number,) = fences(near, sender, opened)
    near.plane.fence_quiet(sender.handle, opened.handle, number)
    near.plane.make_quiet(sender.handle, opened.handle)


async def test_dying_opens_are_waited_for(near: Host, far: Host) -> None:
    """An open that its session has closed may still have bytes in flight."""
    grant, descriptor = await far.grant(await far.session(), imms=8)
    sender = await near.session()
    (opened,) = await near.open(sender, descriptor)
    near.plane.busy_opens.add(opened.handle)
    closing = asyncio.ensure_future(near.opener.close(sender, opened.handle))
    await eventually(lambda: opened.quiet is not None)
    fencing = asyncio.ensure_future(far.owner.fence_grant(grant, SEVEN))
    native = fences(near, sender, opened)
    await eventually(lambda: len(native) == 1)
    assert not fencing.done()
    near.plane.fence_quiet(sender.handle, opened.handle, next(iter(native)))
    await fencing
    near.plane.make_quiet(sender.handle, opened.handle)
    await closing


async def test_fence_of_a_grant_that_ends_waits_for_its_end(
    network: Network, near: Host, far: Host
) -> None:
    grant, descriptor = await far.grant(await far.session(), imms=8)
    sender = await near.session()
    (opened,) = await near.open(sender, descriptor)
    near.plane.busy_opens.add(opened.handle)
    ending = asyncio.ensure_future(far.owner.end_grants([grant]))
    await eventually(lambda: opened.quiet is not None)
    fencing = asyncio.ensure_future(far.owner.fence_grant(grant, SEVEN))
    await asyncio.sleep(0.01)
    assert not fencing.done()
    near.plane.make_quiet(sender.handle, opened.handle)
    await ending
    with pytest.raises(errors.Conflict) as caught:
        await fencing
    assert caught.value.reason == "GRANT_REVOKED"
    assert not network.calls["fence_grants"]


async def test_ranges_are_checked_and_joined(far: Host) -> None:
    grant, _ = await far.grant(await far.session(), imms=16)
    assert check_fence(grant, [(8, 2), (0, 1), (1, 2), (9, 4), (15, 1)]) == (
        range(3),
        range(8, 13),
        range(15, 16),
    )
    for bad in ([], [(0, 1)] * (IMM_RANGES_MAX + 1), [(3, 0)], [(0, 17)], [(16, 1)]):
        with pytest.raises(errors.InvalidRequest):
            check_fence(grant, bad)
    with pytest.raises(errors.InvalidRequest, match="5 to 20 are not all of grant 1, which has 0"):
        check_fence(grant, [(1, 1), (5, 16)])
