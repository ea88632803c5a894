# SPDX-License-Identifier: Apache-2.0
"""The host's NICs and GPUs, and which NICs become rails.

`sysfs` reads a tree into the values of `model`; `distance`, `groups` and `choose` compute with
these alone, so that hosts which nobody has at hand are tested as constructed trees. No driver is
called.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from transferd.daemon.topology import addresses, sysfs
from transferd.daemon.topology.choose import Choice, Verdict, choose

if TYPE_CHECKING:
    from transferd.daemon.config import Config

__all__ = ["Choice", "Verdict", "choose", "rails_of_this_host"]


def rails_of_this_host(config: Config, peer_address: str) -> Choice:
    """Chooses the rails of this host.

    Args:
        config: The daemon's.
        peer_address: Its peer_address as a number; may be empty where it names its rails.

    Returns:
        At least one rail.
    """
    return choose(
        sysfs.read(sysfs.Sysfs(), addresses.ipv4()),
        configured=config.rails,
        provider=config.provider,
        fabric=config.fabric.name,
        library=config.fabric.library,
        peer_address=peer_address,
    )
