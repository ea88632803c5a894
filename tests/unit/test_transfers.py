# SPDX-License-Identifier: Apache-2.0
"""Waiting for jobs and counters by gRPC, on a fake data plane."""

from __future__ import annotations

import asyncio

from support.hosts import Host, Network

WAIT_S = 10.0


async def test_who_is_done_does_not_end_the_waiting_of_others() -> None:
    """Both are woken by one signal; the one that goes must leave the other its next one."""
    host = Host(Network(), 7001)
    session = await host.session()
    await host.grant(session, imms=2)
    for turn in range(1, 21):  # which of the two runs first is not ours to say
        waits = [
            asyncio.ensure_future(host.transfers.wait_counter(session, imm, turn, WAIT_S))
            for imm in (0, 1)
        ]
        await asyncio.sleep(0)
        host.plane.count(session.handle, 0)
        async with asyncio.timeout(WAIT_S / 2):
            await waits[0]
            host.plane.count(session.handle, 1)
            state, _ = await waits[1]
        assert state.value == turn
    await host.end(session)
    host.assert_nothing_left()
    await host.aclose()
