# SPDX-License-Identifier: Apache-2.0
"""The life of mailboxes in the control plane: the real one, on fake data planes."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest

from transferd.daemon import errors
from transferd.daemon.grant import RIGHT_SEND
from transferd.daemon.plane import Detail, mailbox_bytes

from support.hosts import Host, Network, eventually

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from transferd.daemon.mailboxes import Mailbox
    from transferd.daemon.session import Session


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


async def make(host: Host, session: Session, region: int = 0) -> Mailbox:
    work = host.mailboxes.create(session, region, slots=4, slot_bytes=100)
    mailbox: Mailbox = await session.ops.run(work, "make mailbox")
    return mailbox


def _refused(host: Host, session: Session, handle: int) -> Detail | None:
    return host.plane.sessions[session.handle].opens[handle].refused


def test_what_a_mailbox_takes() -> None:
    assert mailbox_bytes(1, 1) == 64 + 64
    assert mailbox_bytes(4, 64) == 64 + 4 * 64
    assert mailbox_bytes(5, 65) == 128 + 5 * 128


async def test_openers_get_its_number_on_every_rail(near: Host, far: Host) -> None:
    owner = await far.session()
    mailbox = await make(far, owner)
    sender = await near.session()
    (opened,) = await near.open(sender, mailbox.descriptor)
    options = near.plane.sessions[sender.handle].opens[opened.handle].options
    assert (options.rights, options.length, options.imm_count) == (RIGHT_SEND, 100, 0)
    assert [(path.key, path.address) for path in options.paths] == [(mailbox.number, 0)]
    # The daemon copies messages: its connections are everybody's, whatever the memory is.
    assert opened.lane.key.isolation == 0


async def test_closing_is_a_fence(near: Host, far: Host) -> None:
    owner = await far.session()
    mailbox = await make(far, owner)
    sender = await near.session()
    (opened,) = await near.open(sender, mailbox.descriptor)
    near.plane.busy_opens.add(opened.handle)
    closing = asyncio.ensure_future(far.mailboxes.close(owner, mailbox.number))
    await eventually(lambda: _refused(near, sender, opened.handle) is not None)
    # A message that is still under way finds its mailbox.
    assert mailbox.number in far.plane.sessions[owner.handle].mailboxes
    assert not closing.done()
    near.plane.make_quiet(sender.handle, opened.handle)
    await closing
    assert not far.plane.sessions[owner.handle].mailboxes
    assert not owner.regions
    assert far.tenant.used["regions"] == far.tenant.used["registered_bytes"] == 0
    assert near.plane.sessions[sender.handle].opens[opened.handle].refused is Detail.REVOKED
    with pytest.raises(errors.NotFound):
        await far.mailboxes.close(owner, mailbox.number)


async def test_its_grant_and_its_region_take_it_along(far: Host) -> None:
    owner = await far.session()
    grant, _ = await far.grant(owner)
    region = grant.region.handle
    first = await make(far, owner, region)
    await far.owner.end_grants([first.grant])
    assert not owner.mailboxes
    await make(far, owner, region)
    await far.sessions.deregister(owner, region)
    assert not owner.mailboxes
    assert not far.plane.sessions[owner.handle].mailboxes


async def test_what_fails_in_between_leaves_nothing(far: Host) -> None:
    owner = await far.session()
    far.tenant.used["grants"] = far.tenant.config.quotas.grants
    with pytest.raises(errors.QuotaExceeded) as caught:
        await make(far, owner)
    assert caught.value.reason == "GRANTS"
    far.tenant.used["grants"] = 0
    assert not far.plane.sessions[owner.handle].mailboxes
    assert not owner.regions
    assert not owner.mailboxes


async def test_a_region_that_ends_takes_no_mailbox(near: Host, far: Host) -> None:
    owner = await far.session()
    grant, descriptor = await far.grant(owner)
    region = grant.region
    sender = await near.session()
    (opened,) = await near.open(sender, descriptor)
    near.plane.busy_opens.add(opened.handle)
    ending = asyncio.ensure_future(far.sessions.deregister(owner, region.handle))
    await eventually(lambda: _refused(near, sender, opened.handle) is not None)
    with pytest.raises(errors.Conflict) as caught:
        await make(far, owner, region.handle)
    assert caught.value.reason == "REGION_ENDING"
    near.plane.make_quiet(sender.handle, opened.handle)
    await ending


async def test_receiving_waits_and_is_told_of_the_end(far: Host) -> None:
    owner = await far.session()
    mailbox = await make(far, owner)
    assert await far.mailboxes.receive(owner, mailbox.number, 10, 0.0) == []
    waiting = asyncio.ensure_future(far.mailboxes.receive(owner, mailbox.number, 2, 20.0))
    await asyncio.sleep(0)
    far.plane.arrive(owner.handle, mailbox.number, b"one")
    assert await waiting == [b"one"]
    for message in (b"two", b"three", b"four"):
        far.plane.arrive(owner.handle, mailbox.number, message)
    assert await far.mailboxes.receive(owner, mailbox.number, 2, 0.0) == [b"two", b"three"]
    assert await far.mailboxes.receive(owner, mailbox.number, 2, 0.0) == [b"four"]
    waiting = asyncio.ensure_future(far.mailboxes.receive(owner, mailbox.number, 2, 20.0))
    await asyncio.sleep(0)
    await far.mailboxes.close(owner, mailbox.number)
    with pytest.raises(errors.NotFound):
        await waiting
