# SPDX-License-Identifier: Apache-2.0
"""How long a newcomer's first command takes."""

from __future__ import annotations

import subprocess
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

from bench import build

if TYPE_CHECKING:
    from collections.abc import Iterator

LIMITS_S = {"first": 240.0, "second": 20.0}
TIMEOUT_S = 900


def times() -> Iterator[float]:
    """Clones what is committed and runs ``deploy/quickstart demo`` there twice.

    System packages that this machine has already are not counted.

    Yields:
        Seconds of each run.

    Raises:
        RuntimeError: A run failed; the text has the end of its output.
    """
    with tempfile.TemporaryDirectory(prefix="tfd-clone-") as folder:
        clone = Path(folder) / "transferd"
        subprocess.run(["git", "clone", "-q", str(build.ROOT), str(clone)], check=True)
        for _ in LIMITS_S:
            begin = time.monotonic()
            done = subprocess.run(
                ["deploy/quickstart", "demo"],
                cwd=clone,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                timeout=TIMEOUT_S,
                check=False,
            )
            if done.returncode:
                raise RuntimeError(f"deploy/quickstart demo failed:\n{done.stdout[-4000:]}")
            yield time.monotonic() - begin
