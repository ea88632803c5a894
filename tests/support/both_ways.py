# SPDX-License-Identifier: Apache-2.0
"""A sender and a receiver of a shared pair of daemons: on two of them, and on one.

A folder's conftest.py imports the fixtures; a module that says otherwise has its own of that name.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

import transferd

if TYPE_CHECKING:
    import random
    from collections.abc import Iterator

    from transferd import Client, Grant, Region

    from support.daemon import DaemonProcess

LENGTH = 1 << 16


@pytest.fixture
def shared_memory() -> bool:
    """Whether the clients have a ring; else they go by gRPC."""
    return True


@pytest.fixture
def sender(
    shared_pair: tuple[DaemonProcess, DaemonProcess], shared_memory: bool
) -> Iterator[Client]:
    """Gives a client of the first daemon."""
    with transferd.Client(shared_pair[0].socket, shared_memory=shared_memory) as client:
        yield client


@pytest.fixture(params=["other daemon", "same daemon"])
def receiver(
    request: pytest.FixtureRequest,
    shared_pair: tuple[DaemonProcess, DaemonProcess],
    shared_memory: bool,
) -> Iterator[Client]:
    """Gives a client of the other daemon, and one of the same."""
    daemon = shared_pair[1 if request.param == "other daemon" else 0]
    with transferd.Client(daemon.socket, shared_memory=shared_memory) as client:
        yield client


def granted(client: Client) -> tuple[Region, Grant]:
    """Makes a region that others may write to and read."""
    region = client.alloc(LENGTH)
    return region, region.grant(imms=range(16), rights={"write", "read"})


def filled(client: Client, seeded: random.Random) -> Region:
    """Makes a region with random bytes."""
    region = client.alloc(LENGTH)
    region.view[:] = seeded.randbytes(LENGTH)
    return region
