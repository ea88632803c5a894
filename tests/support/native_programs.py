# SPDX-License-Identifier: Apache-2.0
"""C programs of ours, built by native/Makefile."""

from __future__ import annotations

import subprocess
from typing import TYPE_CHECKING

from support.tree import ROOT

if TYPE_CHECKING:
    from pathlib import Path


def make(*arguments: str) -> Path:
    """Builds; what is up to date takes no time. Gives the folder of the results."""
    built = subprocess.run(
        ["make", "-s", "-C", ROOT / "native", *arguments],
        check=False,
        capture_output=True,
        text=True,
    )
    assert built.returncode == 0, built.stderr
    return ROOT / "build" / "native" / "gcc"
