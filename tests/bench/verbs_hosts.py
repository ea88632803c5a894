# SPDX-License-Identifier: Apache-2.0
"""Two guests that are two hosts: rails, loss, death. They boot once for all of it."""

from __future__ import annotations

import contextlib
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from bench import verbs_death, verbs_loss, verbs_rails
from bench.guests import GuestEndpoint, telling
from bench.topic import guarded

from vm.daemons import GuestDaemon
from vm.errors import VmError
from vm.image import ensure
from vm.pair import ROLES, Pair

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from bench.report import Row
    from bench.topic import Run

MIB = 1 << 20
NICS = 2
LENGTH = 4 * MIB
PORTS = {"one": 7471, "two": 7475}
CHECKED = "bench.checked"


@dataclass(slots=True)
class Side:
    """What runs in one of the guests.

    Attributes:
        daemons: By number of rails.
        clients: Of the daemon with one rail; the first and another one.
        striping: Client of the daemon with two rails.
    """

    daemons: dict[int, GuestDaemon]
    clients: list[GuestEndpoint]
    striping: GuestEndpoint | None = None


class Hosts:
    """Two guests with daemons and clients.

    Attributes:
        pair: The guests.
        sides: By role, 1 and 2.
    """

    def __init__(self, pair: Pair, keys: Path) -> None:
        self.pair = pair
        self.sides: dict[int, Side] = {}
        self._keys = keys

    def _daemon(self, role: int, name: str, rails: int) -> GuestDaemon:
        keys = {"rails": [f"rxe{rail}" for rail in range(rails)], "log_level": "warning"}
        guest, port = self.pair[role], PORTS[name]
        return GuestDaemon(guest, keys, tls=self._keys, name=name, port=port).start()

    def start(self) -> None:
        """Starts a daemon with one rail and one with two in each guest, and their clients."""
        for role in ROLES:
            daemons = {1: self._daemon(role, "one", 1), 2: self._daemon(role, "two", 2)}
            self.sides[role] = Side(daemons, [])
        with telling(*self.daemons()):
            for side in self.sides.values():
                for daemon in side.daemons.values():
                    daemon.wait_ready()
                side.clients = [GuestEndpoint(side.daemons[1], LENGTH, CHECKED) for _ in range(2)]
                side.striping = GuestEndpoint(side.daemons[2], LENGTH)
            for side in self.sides.values():
                assert side.striping is not None
                for client in (*side.clients, side.striping):
                    client.wait_ready()

    def kill(self, role: int) -> float:
        """Kills a guest; time.monotonic() just before."""
        killed_s = time.monotonic()
        self.pair[role].kill()
        return killed_s

    def replace(self, role: int) -> GuestEndpoint:
        """Boots a new guest in the place of one that was killed; gives a client of its daemon."""
        self.pair.replace(role)
        daemon = self._daemon(role, "one", 1)
        daemon.wait_ready()
        client = GuestEndpoint(daemon, LENGTH, CHECKED)
        self.sides[role] = Side({1: daemon}, [client])
        client.wait_ready()
        return client

    def daemons(self) -> list[GuestDaemon]:
        """All that run."""
        return [daemon for side in self.sides.values() for daemon in side.daemons.values()]

    def check_cards(self) -> None:
        """Sees to it that no figure is taken of a guest that QEMU has cut off.

        Raises:
            VmError: A card stands still.
        """
        stalled = [guest.name for guest in self.pair.guests if guest.card_stalled]
        if stalled:
            raise VmError(f"QEMU has let a card of {', '.join(stalled)} stand still")

    def shape(self, *discipline: str) -> None:
        """Gives what all cards send a queueing discipline, as tc names it; none: takes it away.

        Args:
            discipline: "tbf", "rate", "20mbit", …
        """
        verb = (
            f"replace dev $card root {' '.join(discipline)}" if discipline else "del dev $card root"
        )
        for guest in self.pair.guests:
            guest.run(f"set -e; for card in eth0 eth1; do tc qdisc {verb}; done")


@contextlib.contextmanager
def hosts() -> Iterator[Hosts]:
    """Runs both."""
    with (
        tempfile.TemporaryDirectory(prefix="tfd-") as folder,
        Pair(ensure(), Path(folder), nics=NICS) as pair,
    ):
        made = Hosts(pair, Path(folder) / "keys")
        made.start()
        yield made


def rows(run: Run) -> list[Row]:
    """Measures all of it; the death of a guest comes last."""
    steps = {
        "two rails": verbs_rails.rows,
        "loss": verbs_loss.rows,
        "death": verbs_death.rows,
    }
    found: list[Row] = []
    with hosts() as both:
        for name, step in steps.items():

            def measured(step: Callable[[Run, Hosts], list[Row]] = step) -> list[Row]:
                with telling(*both.daemons()):
                    try:
                        return step(run, both)
                    finally:
                        both.check_cards()

            found += guarded(run, f"verbs, two hosts: {name}", measured)
    return found
