# SPDX-License-Identifier: Apache-2.0
"""Daemons on EFA's face (native/tests/efaface/): a library that looks like EFA's libfabric.

As a program it prints the configuration as YAML, for TRANSFERD_TEST_CONFIG.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

NATIVE = Path(__file__).parents[2] / "native"


def face_library() -> Path:
    """Makes the library, and returns its path.

    Raises:
        RuntimeError: It cannot be made, with what the compiler says.
    """
    made = subprocess.run(
        ["make", "-s", "-C", str(NATIVE), "face"], capture_output=True, text=True, check=False
    )
    if made.returncode:
        raise RuntimeError(f"EFA's face cannot be made: {made.stderr}")
    return Path(made.stdout.split()[-1])


def face_config(rails: int = 1) -> dict[str, Any]:
    """Returns the keys of a daemon's configuration that put it on EFA's face.

    Args:
        rails: How many devices, at most 2.
    """
    return {
        "provider": "libfabric",
        "rails": ["127.0.0.1", "127.0.0.2"][:rails],
        "fabric": {"name": "efa", "library": str(face_library())},
    }


if __name__ == "__main__":
    sys.stdout.write(yaml.safe_dump(face_config(), default_flow_style=True))
