# SPDX-License-Identifier: Apache-2.0
"""The host's NICs and GPUs, and which NICs become rails.

`sysfs` reads a tree into the values of `model`; `distance`, `groups` and `choose` compute with
these alone, so that hosts which nobody has at hand are tested as constructed trees. No driver is
called.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from transferd.daemon.topology import addresses, sysfs
from transferd.daemon.topology.choose import Choice, NoRailError, Verdict, choose

if TYPE_CHECKING:
    from transferd.daemon.config import Config

__all__ = ["Choice", "NoRailError", "Verdict", "choose", "rails_of_this_host"]


def rails_of_this_host(config: Config, peer_address: str, verbs_failed: str = "") -> Choice:
    """Chooses the rails of this host.

    Args:
        config: The daemon's.
        peer_address: Its peer_address as a number; may be empty where it names its rails.
        verbs_failed: Why provider verbs could not be opened, for a second choice without it.

    Returns:
        At least one rail.

    Raises:
        NoRailError: Provider verbs is asked for, and there is no device that it can use.
    """
    modules = Path("/lib/modules") / os.uname().release
    return choose(
        sysfs.read(sysfs.Sysfs(), addresses.ipv4(), Path("/dev"), modules),
        configured=config.rails,
        provider=config.provider,
        fabric=config.fabric.name,
        library=config.fabric.library,
        verbs=config.verbs,
        peer_address=peer_address,
        verbs_failed=verbs_failed,
    )
