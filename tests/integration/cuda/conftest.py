# SPDX-License-Identifier: Apache-2.0
"""Fixtures of this folder: two clients of one daemon, on a driver of host memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

import transferd

from support.fakecuda import FakeCuda, installed

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transferd import Client

    from support.daemon import DaemonProcess


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeCuda]:
    """Puts the driver in the place of the real one."""
    with installed(monkeypatch) as made:
        yield made


@pytest.fixture
def sender(cuda: FakeCuda, shared_pair: tuple[DaemonProcess, DaemonProcess]) -> Iterator[Client]:
    """A client of a daemon."""
    with transferd.Client(shared_pair[0].socket, name="sender") as made:
        yield made


@pytest.fixture
def receiver(cuda: FakeCuda, shared_pair: tuple[DaemonProcess, DaemonProcess]) -> Iterator[Client]:
    """Another client of it."""
    with transferd.Client(shared_pair[0].socket, name="receiver") as made:
        yield made
