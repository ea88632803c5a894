# SPDX-License-Identifier: Apache-2.0
"""What the bare provider would do with the same writes, for the demo's comparison.

The program that measures it is part of the benchmarks (tests/bench/raw), so of a clone and not of
an installation; it is compiled on first use.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections import Counter
from pathlib import Path

# Smaller writes are a few in a thousand of the model's bytes.
SIZE_MIN = 64 << 10
BYTES_PER_SIZE = 512 << 20  # sent to measure one size: a fraction of a second
WINDOW_BYTES = 8 << 20
SEGMENT_BYTES = 1 << 20  # as the daemon cuts large writes
SEGMENTS_IN_FLIGHT = 4
TIMEOUT_S = 30.0
SOURCES = ("fabric.c", "fabric.h", "fi_raw.c")  # another program lies beside them
FLAGS = ("-std=gnu11", "-O2", "-D_GNU_SOURCE")


def gbps(sizes: list[int]) -> float | str:
    """Measures the bare provider with writes of these sizes, cut as the daemon cuts them.

    Args:
        sizes: Bytes of each write.

    Returns:
        The rate over all of them, or a sentence that says why there is none.
    """
    root = Path(__file__).resolve().parents[2]
    if not (root / "tests" / "bench" / "raw").is_dir():
        return "the program for it comes with a clone, not with this installation"
    try:
        program = _build(root)
        wanted = Counter(size for size in sizes if size >= SIZE_MIN)
        seconds = sum(
            size * count * 8e-9 / _measure(program, size) for size, count in wanted.items()
        )
    except (OSError, subprocess.SubprocessError, ValueError, KeyError, ZeroDivisionError) as error:
        return f"the program for it failed ({type(error).__name__})"
    return sum(size * count for size, count in wanted.items()) * 8e-9 / seconds


def _build(root: Path) -> Path:
    """Compiles the program unless that is done; where the benchmarks put it, too."""
    folder = root / "tests" / "bench" / "raw"
    sources = [folder / name for name in SOURCES]
    program = root / "build" / "bench" / "fi_raw"
    newest = max(source.stat().st_mtime for source in sources)
    if not program.exists() or program.stat().st_mtime < newest:
        program.parent.mkdir(parents=True, exist_ok=True)
        units = [str(source) for source in sources if source.suffix == ".c"]
        command = [os.environ.get("CC", "cc"), *FLAGS, *units, "-o", str(program), "-ldl"]
        subprocess.run(command, check=True, capture_output=True, timeout=TIMEOUT_S)
    return program


def _measure(program: Path, size: int) -> float:
    window = max(1, WINDOW_BYTES // size)
    cut = (SEGMENT_BYTES, SEGMENTS_IN_FLIGHT) if size > SEGMENT_BYTES else ()
    numbers = (size, window, BYTES_PER_SIZE // size, *cut)
    done = subprocess.run(
        [str(program), "bw", *map(str, numbers)],
        check=True,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )
    return float(json.loads(done.stdout)["gbps"])
