# SPDX-License-Identifier: Apache-2.0
"""Two hosts whose rails are limited to 1 Gbit/s each: tbf on veth between namespaces."""

from __future__ import annotations

import contextlib
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from support import netns

if TYPE_CHECKING:
    from collections.abc import Iterator

    from support.daemon import DaemonProcess

RATE = "1gbit"


@contextlib.contextmanager
def limited_daemons(rails: int) -> Iterator[list[DaemonProcess]]:
    """Runs a daemon on each of two hosts with so many rails of 1 Gbit/s."""
    with contextlib.ExitStack() as stack:
        place = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="tfd-")))
        network = stack.enter_context(netns.network())
        daemons = []
        for number in range(2):
            directory = place / str(number)
            directory.mkdir()
            host = network.host(rails, RATE)
            daemon = host.daemon(directory, place / "tls", log_level="warning")
            daemons.append(stack.enter_context(daemon))
        yield daemons
