# SPDX-License-Identifier: Apache-2.0
"""Fixtures of this folder: a driver that is none, and the staging that uses it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from transferd.daemon.staging import Staging

from support.fake_plane import FakePlane
from support.softcuda import Faults, SoftCuda, allocated
from support.staging import LENGTH, of_handle

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from pathlib import Path

    from transferd.daemon.cuda import CudaMemory


@pytest.fixture(scope="module")
def cuda() -> SoftCuda:
    """A driver."""
    return SoftCuda()


@pytest.fixture
def faults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Faults:
    """Failures of the helpers; this process has opened its driver before, without them."""
    monkeypatch.setenv("SOFTCUDA_FAULTS", str(tmp_path))
    return Faults(tmp_path)


@pytest.fixture
def address(cuda: SoftCuda) -> Iterator[int]:
    """Memory of an application."""
    with allocated(cuda, LENGTH) as address:
        yield address


@pytest.fixture
def memory(cuda: SoftCuda, address: int) -> CudaMemory:
    """That memory as the daemon has it."""
    return of_handle(1, cuda.handle(address))


@pytest.fixture
def mute(tmp_path: Path) -> str:
    """In the place of Python: a helper that neither says nor hears anything."""
    script = tmp_path / "mute"
    script.write_text("#!/bin/sh\nexec sleep 600\n")
    script.chmod(0o755)
    return str(script)


@pytest.fixture
def plane() -> FakePlane:
    """What is told to it."""
    return FakePlane()


@pytest.fixture
async def staging(cuda: SoftCuda, plane: FakePlane) -> AsyncIterator[Staging]:
    """All helpers; they end with the test."""
    made = Staging(plane, enabled=True, library=cuda.path)
    yield made
    await made.aclose()
    assert not list(plane.open_stages())
