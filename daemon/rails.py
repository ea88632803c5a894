# SPDX-License-Identifier: Apache-2.0
"""Opening the rails: what the topology chose, and what else where that cannot be opened."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from transferd.daemon import memlock
from transferd.daemon.config import split_host_port
from transferd.daemon.peer import is_nic
from transferd.daemon.plane import GroupOptions, PlaneError, VerbsOptions
from transferd.daemon.sockets import StartError, numeric_address
from transferd.daemon.topology import NoRailError, rails_of_this_host

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transferd.daemon.config import Config
    from transferd.daemon.plane import Plane, RailInfo
    from transferd.daemon.topology import Choice


async def open_rails(plane: Plane, config: Config) -> tuple[int, Choice]:
    """Chooses the rails and opens them.

    Args:
        plane: Without a group yet.
        config: The daemon's.

    Returns:
        The group, and how it was chosen.

    Raises:
        StartError: There is nothing that the configured provider could use.
        PlaneError: The provider could not open them; says what to do.
    """
    memlock.raise_limit()
    choice = _choose(config)
    try:
        return await plane.open_group(group_options(config, choice)), choice
    except PlaneError as error:
        # What was named is not exchanged for something else.
        if config.provider != "auto" or choice.provider != "verbs" or config.rails:
            raise
        choice = _choose(config, error.text)
    return await plane.open_group(group_options(config, choice)), choice


def _choose(config: Config, verbs_failed: str = "") -> Choice:
    address = ""  # where rails are named, a name that only peers can resolve is good enough
    if not config.rails:
        host, port = split_host_port(config.advertised)
        address = numeric_address("peer_address", host, port)[1]
    try:
        return rails_of_this_host(config, address, verbs_failed)
    except NoRailError as error:
        raise StartError(str(error)) from None


def group_options(config: Config, choice: Choice) -> GroupOptions:
    """Makes what the data plane is given."""
    is_verbs = choice.provider == "verbs"
    verbs = {name: getattr(config.verbs, name) for name in VERBS_OPTIONS}
    return GroupOptions(
        provider=choice.provider,
        fabric=config.fabric.name,
        rails=choice.names,
        # The simulated fabric is for tests, which want all traffic on it.
        with_local=config.provider != "sim",
        segment_bytes=config.fabric.segment,
        window_bytes=config.fabric.window,
        copy_threads=config.copiers,
        library=config.verbs.library if is_verbs else config.fabric.library,
        verbs=VerbsOptions(**verbs),
        staging_bytes=config.gpu.staging_bytes if is_staged(config, choice) else 0,
    )


def is_staged(config: Config, choice: Choice) -> bool:
    """Whether GPU memory that no NIC reaches goes through host memory."""
    return config.gpu.staging == "on" or (config.gpu.staging == "auto" and choice.gpus > 0)


VERBS_OPTIONS = tuple(field.name for field in dataclasses.fields(VerbsOptions))


def any_up(rails: Sequence[RailInfo]) -> bool:
    """Whether a NIC is up; of a host that has none: a rail."""
    nics = [rail for rail in rails if is_nic(rail.protocol)]
    return any(rail.up for rail in nics or rails)


def warnings(config: Config, choice: Choice) -> list[str]:
    """Says what is not as it should be about the rails; one sentence each."""
    found = [choice.fallback] if choice.fallback else []
    if choice.provider in memlock.PINNING:
        quotas = sum(one.quotas.registered_bytes for one in config.effective_tenants())
        wanted = min(quotas, memlock.ram())
        if said := memlock.warning(memlock.limit(), wanted, len(choice.rails)):
            found.append(said)
    return found
