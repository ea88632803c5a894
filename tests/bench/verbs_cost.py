# SPDX-License-Identifier: Apache-2.0
"""What posting through verbs costs on a device that does nothing, in time and instructions.

The device is the null mode of the double of libibverbs (``native/tests/softverbs``): what is
posted is written into a slot, as a driver would, and is complete. Its own instructions are told
apart by the library that they are in; its own time is said beside ours and not taken off.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from bench import build
from bench.report import Row
from bench.stats import spread
from bench.worker_cost import figures

if TYPE_CHECKING:
    from bench.topic import Run

PEERS = 56
MORE, FEWER = 120, 20  # rounds, of which the difference counts
SCATTER_US, INSTRUCTIONS = 6, 400


def rows(run: Run) -> list[Row]:
    """Measures on one thread; nothing moves."""
    program, library = build.verbs_cost(), build.softverbs()
    return [times(run, program, library), *instructions(run, program, library)]


def times(run: Run, program: Path, library: Path) -> Row:
    """Times from taking a scatter out of the ring until its last doorbell."""
    run.gate.wait()
    rounds = run.scaled(5000)
    us = {
        what: [ns / 1000 for ns in figures(program, library, what, PEERS, PEERS, rounds)]
        for what in ("worker", "provider", "device")
    }
    beside = f"provider alone {median(us['provider']):.2f}, device {median(us['device']):.2f}"
    run.beside(f"verbs on a null device: {PEERS} WriteImm to as many peers, of which, µs", beside)
    bar = f"verbs on a null device: scatter to {PEERS} peers posted"
    return Row(bar, median(us["worker"]), "µs", "<=", SCATTER_US, spread(us["worker"]))


def instructions(run: Run, program: Path, library: Path) -> list[Row]:
    """Counts the provider's for a WriteImm, until it is told that it is done."""
    bar = "verbs on a null device: instructions of the provider a WriteImm"
    if not shutil.which("valgrind"):
        run.skip(bar, "valgrind is not installed")
        return []
    each = {
        (what, peers): instructions_a_write(program, library, what, peers)
        for what in ("provider", "worker")
        for peers in (PEERS, 1)
    }
    whole = f"{each['worker', PEERS]:.0f}; all to one peer {each['worker', 1]:.0f}"
    run.beside("verbs on a null device: instructions of worker and provider a WriteImm", whole)
    return [
        Row(f"{bar}, {name}", each["provider", peers], "", "<=", INSTRUCTIONS, "callgrind")
        for peers, name in ((PEERS, f"{PEERS} peers"), (1, f"{PEERS} to one peer"))
    ]


def instructions_a_write(program: Path, library: Path, what: str, peers: int) -> float:
    """Counts those of rounds beyond the first ones, but for the device's own."""
    more, fewer = (ours(program, library, what, peers, rounds) for rounds in (MORE, FEWER))
    return (more - fewer) / (PEERS * (MORE - FEWER))


def ours(program: Path, library: Path, what: str, peers: int, rounds: int) -> int:
    """Counts the instructions that are not the device's.

    Raises:
        RuntimeError: Callgrind did not say.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "callgrind.out"
        subprocess.run(
            [
                "valgrind",
                "--tool=callgrind",
                "--toggle-collect=cost_*",
                f"--callgrind-out-file={path}",
                *(str(program), str(library), what, str(peers), str(PEERS), str(rounds)),
            ],
            check=True,
            capture_output=True,
            timeout=300,
        )
        found = by_object(path.read_text())
    if library.name not in found or program.name not in found:
        raise RuntimeError(f"callgrind tells of {sorted(found)}, not of {library.name} and ours")
    return sum(count for name, count in found.items() if name != library.name)


def by_object(profile: str) -> dict[str, int]:
    """Sums the instructions of a callgrind profile, of each program and library by itself.

    A line of numbers is a position and a cost; behind "calls=" it is what the called one cost,
    which has lines of its own. Names are written once, then told by their number.
    """
    names: dict[str, str] = {}
    found: dict[str, int] = {}
    current, called = "", False
    for line in profile.splitlines():
        if named := re.fullmatch(r"(c?ob)=(\(\d+\))(?: (.+))?", line):
            kind, number, path = named.groups()
            if path:
                names[number] = Path(path).name
            if kind == "ob":
                current = names[number]
        elif line.startswith("calls="):
            called = True
        elif re.match(r"[-+*\d]", line):
            if not called:
                found[current] = found.get(current, 0) + int(line.split()[1])
            called = False
    return found
