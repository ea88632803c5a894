# SPDX-License-Identifier: Apache-2.0
"""Two guests that are two hosts, joined by one or two links.

A link is two datagram sockets, one of each guest's QEMU. Nothing has to be there to send to, so a
guest may die, and another takes its place, while its peer notices no more than silence.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from vm.guest import Guest, Machine, Nic

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path
    from types import TracebackType

    from vm.image import Image

ROLES = (1, 2)
CPUS = 1  # two guests of one: most machines that run tests have few
MEMORY_MIB = 1536


def address(role: int, nic: int = 0) -> str:
    """IPv4 address of a guest on a link."""
    return f"10.77.{nic}.{role}"


def card(folder: Path, role: int, nic: int) -> Nic:
    """A guest's end of a link; the sockets of all links are in one folder."""
    other = 3 - role
    return Nic(
        mac=f"52:54:00:00:{nic:02x}:{role:02x}",
        address=f"{address(role, nic)}/24",
        local=folder / f"{nic}-{role}",
        remote=folder / f"{nic}-{other}",
    )


class Pair:
    """Two guests; ``pair[1]`` and ``pair[2]`` are the ones that run now."""

    def __init__(
        self,
        image: Image,
        folder: Path,
        *,
        nics: int = 1,
        cpus: int = CPUS,
        memory_mib: int = MEMORY_MIB,
        rxe: bool = True,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """Prepares them; :meth:`boot` starts them.

        Args:
            image: What they boot.
            folder: An empty folder, with a short path: it holds sockets.
            nics: Links between them: eth0 of one to eth0 of the other, and so on.
            cpus: Processors of each.
            memory_mib: Memory of each.
            rxe: Whether their kernels have soft-RoCE.
            environment: What each process in them finds in its environment.
        """
        self._image = image
        self._folder = folder
        self._machines = {
            role: Machine(
                name=f"host{role}",
                role=role,
                nics=tuple(card(folder, role, nic) for nic in range(nics)),
                cpus=cpus,
                memory_mib=memory_mib,
                rxe=rxe,
                environment={"PEER": address(3 - role), **(environment or {})},
            )
            for role in ROLES
        }
        self._boots = 0
        self._guests: dict[int, Guest] = {}

    def __getitem__(self, role: int) -> Guest:
        """The guest of this number."""
        return self._guests[role]

    @property
    def guests(self) -> list[Guest]:
        """Both."""
        return [self._guests[role] for role in ROLES]

    def boot(self) -> Pair:
        """Boots those that do not run, both at once; raises as :meth:`Guest.boot` does."""
        fresh = [role for role in ROLES if role not in self._guests or not self._guests[role].alive]
        for role in fresh:
            self._guests[role] = self._make(role).start()
        for role in fresh:
            self._guests[role].wait_ready()
        return self

    def replace(self, role: int) -> Guest:
        """Boots a new guest on the links of the old one, which is killed if it runs."""
        self._guests[role].kill()
        return self.boot()[role]

    def _make(self, role: int) -> Guest:
        self._boots += 1
        folder = self._folder / f"host{role}-{self._boots}"
        folder.mkdir()
        return Guest(self._image, self._machines[role], folder)

    def close(self) -> None:
        """Kills what runs."""
        for guest in self._guests.values():
            guest.kill()

    def __enter__(self) -> Pair:
        """Boots both."""
        with contextlib.ExitStack() as undo:
            undo.callback(self.close)
            self.boot()
            undo.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Kills what runs."""
        self.close()
