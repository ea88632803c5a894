# SPDX-License-Identifier: Apache-2.0
"""Two hosts whose rails are limited to 1 Gbit/s each: tbf on veth between namespaces."""

from __future__ import annotations

import contextlib
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from support import netns

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from support.daemon import DaemonProcess

RATE = "1gbit"


@contextlib.contextmanager
def limited_daemons(
    rails: int, configure: Callable[[Path], dict[str, Any]] | None = None
) -> Iterator[list[DaemonProcess]]:
    """Runs a daemon on each of two hosts with so many rails of 1 Gbit/s.

    Args:
        rails: Of each host.
        configure: Gives further keys of a daemon's configuration; is told its directory.
    """
    with contextlib.ExitStack() as stack:
        place = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="tfd-")))
        network = stack.enter_context(netns.network())
        daemons = []
        for number in range(2):
            directory = place / str(number)
            directory.mkdir()
            host = network.host(rails, RATE)
            keys = {"log_level": "warning", **(configure(directory) if configure else {})}
            daemons.append(stack.enter_context(host.daemon(directory, place / "tls", **keys)))
        yield daemons
