# SPDX-License-Identifier: Apache-2.0
"""Hosts with different numbers of rails: every byte arrives, every count is exact."""

from __future__ import annotations

import contextlib
import hashlib
from typing import TYPE_CHECKING

import pytest

import transferd

from support import netns

if TYPE_CHECKING:
    import random
    from collections.abc import Iterator
    from pathlib import Path

    from support.daemon import DaemonProcess

WHY_NOT = netns.missing()
pytestmark = pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT)

LENGTH = 8 << 20
PAGE = 4096
# 16,385 bytes do not divide over two rails, 1 byte not over any; from 128 KiB on writes are cut.
SIZES = [0, 1, 7, 16_385, (128 << 10) - 1, 128 << 10, (1 << 20) + 3, LENGTH]


@contextlib.contextmanager
def hosts(directory: Path, *rails: int) -> Iterator[list[DaemonProcess]]:
    """Runs a daemon on each of some hosts."""
    with netns.network() as network, contextlib.ExitStack() as stack:
        daemons = []
        for number, count in enumerate(rails):
            place = directory / str(number)
            place.mkdir()
            daemon = network.host(count).daemon(place, directory / "tls")
            daemons.append(stack.enter_context(daemon))
        yield daemons


def rails_used(here: int, there: int) -> int:
    """Rails of the sender that a large write takes: parts are 1, 2, 4 or 8, one for each path."""
    paths = max(here, there)
    return min(here, 1 << (paths.bit_length() - 1))


def write_all_sizes(sender: transferd.Client, receiver: transferd.Client, content: bytes) -> int:
    """Writes each size, checks bytes and counts; tells how many rails the largest took."""
    source, target = sender.alloc(LENGTH), receiver.alloc(LENGTH)
    source.view[:] = content
    descriptor = target.grant(imms=range(4)).descriptor
    counter = receiver.counter(1)
    rails = 0
    for number, size in enumerate(SIZES, 1):
        target.view[:size] = bytes(size)
        job = sender.write(source[LENGTH - size :], descriptor, imm=1)
        job.wait(20)
        counter.wait(number, 20)
        assert counter.value == number
        assert target.view[:size] == content[LENGTH - size :], f"{size} bytes"
        assert job.path is not None
        rails = max(rails, job.path.rails)
    assert hashlib.sha256(target.view).digest() == hashlib.sha256(content).digest()
    write_pages(sender, source, descriptor, target, counter)
    assert (counter.faults, counter.lost) == (0, 0)
    return rails


def write_pages(
    sender: transferd.Client,
    source: transferd.Region,
    descriptor: bytes,
    target: transferd.Region,
    counter: transferd.Counter,
) -> None:
    """Writes everything in pages, the last first, counted one by one and as one."""
    here = range(LENGTH // PAGE)
    there = here[::-1]
    for count, counted in (("page", len(here)), ("job", 1)):
        before = counter.value
        target.view[:] = bytes(LENGTH)
        job = sender.write_pages(source, here, descriptor, there, PAGE, imm=1, count=count)
        job.wait(20)
        counter.wait(before + counted, 20)
        assert counter.value == before + counted
        for i, j in zip(here, there, strict=True):
            wanted = source.view[i * PAGE : (i + 1) * PAGE]
            assert target.view[j * PAGE : (j + 1) * PAGE] == wanted, f"page {i}"


@pytest.mark.parametrize(("here", "there"), [(1, 2), (2, 2), (2, 3), (4, 1)])
def test_writes_between_unequal_hosts(
    short_tmp: Path, seeded: random.Random, here: int, there: int
) -> None:
    content = seeded.randbytes(LENGTH)
    with (
        hosts(short_tmp, here, there) as (near, far),
        transferd.Client(near.socket) as one,
        transferd.Client(far.socket) as other,
    ):
        assert write_all_sizes(one, other, content) == rails_used(here, there)
        assert write_all_sizes(other, one, content) == rails_used(there, here)
