# SPDX-License-Identifier: Apache-2.0
"""What the worker itself costs on the null fabric: a page, a scatter, in time and instructions."""

from __future__ import annotations

import re
import shutil
import subprocess
from statistics import median
from typing import TYPE_CHECKING

from bench import build
from bench.report import Row
from bench.stats import spread

if TYPE_CHECKING:
    from pathlib import Path

    from bench.topic import Run

PAGES, FEWER_PAGES = 16_000, 4_000
TARGETS = 56
# How a rail takes pages: ranges of one post, and what that is like.
RAILS = {1: "one post a page", 64: "posts of up to 64"}
NS_A_PAGE, INSTRUCTIONS_A_PAGE, SCATTER_US = 60, 250, 4
PASSES = "worker_passes"  # the function that calls the worker


def rows(run: Run) -> list[Row]:
    """Measures on one thread; nothing moves, and the simulated rail's own work is not taken off."""
    program = build.worker_cost()
    return [*pages(run, program), scatter(run, program), *instructions(run, program)]


def figures(program: Path, *words: object) -> list[float]:
    """Runs the program; reads what it prints, a figure a line."""
    command = [str(program), *map(str, words)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)
    return [float(line) for line in done.stdout.split()]


def pages(run: Run, program: Path) -> list[Row]:
    """Times jobs of pages of which none are adjacent."""
    found = []
    for parts, rail in RAILS.items():
        run.gate.wait()
        ns = figures(program, "pages", parts, PAGES, run.scaled(200))
        bar = f"worker on the null fabric, {rail}: a page of a job of {PAGES:,}"
        found.append(Row(bar, median(ns), "ns", "<=", NS_A_PAGE, spread(ns, 1)))
    return found


def scatter(run: Run, program: Path) -> Row:
    """Times from taking a scatter out of the ring until its last post."""
    run.gate.wait()
    us = [ns / 1000 for ns in figures(program, "scatter", TARGETS, run.scaled(5000))]
    bar = f"worker on the null fabric: scatter to {TARGETS} peers posted"
    return Row(bar, median(us), "µs", "<=", SCATTER_US, spread(us))


def instructions(run: Run, program: Path) -> list[Row]:
    """Counts them, with all that the worker calls; what a job costs besides its pages drops out."""
    if not shutil.which("valgrind"):
        run.skip("worker on the null fabric: instructions a page", "valgrind is not installed")
        return []
    found = []
    for parts, rail in RAILS.items():
        more, fewer = (collected(program, parts, count) for count in (PAGES, FEWER_PAGES))
        each = (more - fewer) / (2 * (PAGES - FEWER_PAGES))  # two jobs: one to warm up
        bar = f"worker on the null fabric, {rail}: instructions a page"
        found.append(Row(bar, each, "", "<=", INSTRUCTIONS_A_PAGE, "callgrind"))
    return found


def collected(program: Path, parts: int, count: int) -> int:
    """Counts the instructions of two jobs.

    Raises:
        RuntimeError: Callgrind did not say.
    """
    done = subprocess.run(
        [
            "valgrind",
            "--tool=callgrind",
            f"--toggle-collect={PASSES}",
            "--callgrind-out-file=/dev/null",
            *(str(program), "pages", str(parts), str(count), "1"),
        ],
        check=True,
        capture_output=True,
        text=True,
        timeout=300,
    )
    match = re.search(r"Collected : (\d+)", done.stderr)
    if not match:
        raise RuntimeError(f"callgrind says nothing of what it collected: {done.stderr[-500:]}")
    return int(match[1])
