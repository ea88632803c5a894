# SPDX-License-Identifier: Apache-2.0
"""Two daemons in one process, for what only things of one process can be joined by.

The devices of softverbs (`native/tests/softverbs`) are such: daemons of two processes each have a
network of their own.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from support.daemon import DaemonProcess

if TYPE_CHECKING:
    from collections.abc import Mapping

PROGRAM = Path(__file__).with_name("twins_process.py")


class Twins(DaemonProcess):
    """The first of two daemons, and the process of both: it starts and stops them.

    Attributes:
        second: The other; only to be talked to.
    """

    def __init__(self, directory: Path, overrides: Mapping[str, Any]) -> None:
        """Takes what both have in common."""
        directories = [directory / name for name in ("a", "b")]
        for each in directories:
            each.mkdir()
        super().__init__(directories[0], overrides)
        self.second = DaemonProcess(directories[1], overrides)

    def arguments(self) -> list[str]:
        """Writes both configurations; tells what the interpreter is given."""
        paths = []
        # The second one first: when the first one serves, both do.
        for daemon in (self.second, self):
            daemon.config_path.write_text(yaml.safe_dump(daemon.config))
            paths.append(str(daemon.config_path))
        return [str(PROGRAM), *paths]
