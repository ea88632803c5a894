# SPDX-License-Identifier: Apache-2.0
"""Fixtures of the tests that run in guests; README.md describes them."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from vm import image, inner
from vm.daemons import Daemons
from vm.errors import Unavailable
from vm.guest import Guest, Machine
from vm.pair import Pair

if TYPE_CHECKING:
    from collections.abc import Iterator

HERE = Path(__file__).parent
TEST_S = 600


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks the tests of this folder, and gives each the time that emulated machines need."""
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.vm)
            item.add_marker(pytest.mark.slow)
            if item.get_closest_marker("timeout") is None:
                item.add_marker(pytest.mark.timeout(TEST_S))


@pytest.fixture(scope="session")
def vm_image(request: pytest.FixtureRequest) -> image.Image:
    """Gives what guests boot; skips where there can be none."""
    if request.config.option.without_vm:
        pytest.skip(request.config.option.without_vm)
    try:
        built = image.ensure()
    except Unavailable as error:
        pytest.skip(str(error))
    # Before any guest boots: what changes on the host later, it may not see.
    inner.build_programs()
    return built


@pytest.fixture(scope="session")
def vm_folder() -> Iterator[Path]:
    """Gives a folder for all guests' files, with a path so short that a socket fits in."""
    folder = Path(tempfile.mkdtemp(prefix="tfd-vm-"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


class Lone:
    """A guest that is booted again when a test has killed it."""

    def __init__(self, built: image.Image, folder: Path, machine: Machine) -> None:
        self._image = built
        self._folder = folder
        self._machine = machine
        self._boots = 0
        self._guest: Guest | None = None

    def get(self) -> Guest:
        """Gives the guest, which runs."""
        if self._guest is None or not self._guest.alive:
            self._boots += 1
            folder = self._folder / f"{self._machine.name}-{self._boots}"
            folder.mkdir()
            self._guest = Guest(self._image, self._machine, folder)
            self._guest.boot()
        return self._guest

    def close(self) -> None:
        """Kills it."""
        if self._guest is not None:
            self._guest.kill()


@pytest.fixture(scope="session")
def vm_lone(vm_image: image.Image, vm_folder: Path) -> Iterator[Lone]:
    """Holds the guest of :func:`guest`."""
    lone = Lone(vm_image, vm_folder, Machine(name="lone"))
    yield lone
    lone.close()


@pytest.fixture(scope="session")
def vm_bare(vm_image: image.Image, vm_folder: Path) -> Iterator[Lone]:
    """Holds the guest of :func:`guest_without_rxe`."""
    lone = Lone(vm_image, vm_folder, Machine(name="bare", cpus=1, memory_mib=1024, rxe=False))
    yield lone
    lone.close()


def make_pair(built: image.Image, folder: Path, nics: int) -> Iterator[Pair]:
    """Gives a pair that runs until the session ends."""
    folder = folder / f"pair{nics}"
    folder.mkdir()
    pair = Pair(built, folder, nics=nics)
    yield pair
    pair.close()


@pytest.fixture(scope="session")
def vm_pair(vm_image: image.Image, vm_folder: Path) -> Iterator[Pair]:
    """Holds the guests of :func:`pair`."""
    yield from make_pair(vm_image, vm_folder, 1)


@pytest.fixture(scope="session")
def vm_pair_of_two_links(vm_image: image.Image, vm_folder: Path) -> Iterator[Pair]:
    """Holds the guests of :func:`two_links`."""
    yield from make_pair(vm_image, vm_folder, 2)


@pytest.fixture(scope="session")
def vm_daemons(vm_pair: Pair, vm_folder: Path) -> Iterator[Daemons]:
    """Holds the daemons of :func:`daemons`."""
    made = Daemons(vm_pair, vm_folder / "tls")
    yield made
    made.close()


@pytest.fixture
def guest(vm_lone: Lone) -> Guest:
    """Gives one guest: rxe0 on a card that leads nowhere, both ends of each transfer in it."""
    return vm_lone.get()


@pytest.fixture
def guest_without_rxe(vm_bare: Lone) -> Guest:
    """Gives one guest whose kernel has no soft-RoCE."""
    return vm_bare.get()


@pytest.fixture
def pair(vm_pair: Pair) -> Pair:
    """Gives two guests with one link between them; both run, whatever a test before has done."""
    return vm_pair.boot()


@pytest.fixture
def two_links(vm_pair_of_two_links: Pair) -> Pair:
    """Gives two guests with two links between them; both run."""
    return vm_pair_of_two_links.boot()


@pytest.fixture
def daemons(vm_daemons: Daemons) -> Daemons:
    """Gives the pair with a daemon on each; all run, whatever a test before has done."""
    return vm_daemons.boot()
