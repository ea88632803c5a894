# SPDX-License-Identifier: Apache-2.0
"""Topics that a device may hang in: each in a process of its own, which a bound ends."""

from __future__ import annotations

import contextlib
import faulthandler
import importlib
import multiprocessing
import os
import signal
import time
import traceback
from typing import TYPE_CHECKING, Any

from rich.console import Console

from bench.options import Options
from bench.quiet import Gate
from bench.report import Report, Row
from bench.topic import Run

from support import gpu

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from multiprocessing.connection import Connection

DUMP_S = 5.0  # before the bound all stacks are told
START_S = 45.0  # until it is known whether there is a GPU
PATIENCE_S = 15.0  # of a topic with a machine that is not quiet: its bound goes on meanwhile


def bounded(
    call: Callable[..., None], arguments: tuple[Any, ...], bound_s: float
) -> tuple[Any, str]:
    """Calls in another process, which is ended with all that it has started.

    Args:
        call: A function of a module. Its first parameter is a function to tell what it has found
            so far, which is pickled, as the others are.
        arguments: The others.
        bound_s: How long it may take; shortly before, its stacks go to stderr.

    Returns:
        What it has told last, None if nothing; and why that is not all, empty if it is.
    """
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_run, args=(theirs, call, arguments, bound_s - DUMP_S))
    process.start()
    theirs.close()
    try:
        return _listen(ours, time.monotonic() + bound_s, f"it did not end within {bound_s:g} s")
    finally:
        with contextlib.suppress(ProcessLookupError, PermissionError):  # daemons and peers, too
            os.killpg(process.pid or 0, signal.SIGKILL)
        process.kill()
        process.join(DUMP_S)  # a driver may keep it for a while
        ours.close()


def _listen(pipe: Connection, end: float, late: str) -> tuple[Any, str]:
    told = None
    while pipe.poll(max(0.0, end - time.monotonic())):
        try:
            kind, said = pipe.recv()
        except EOFError:
            return told, "its process died"
        if kind != "told":
            return told, said
        told = said
    return told, late


def _run(pipe: Connection, call: Callable[..., None], arguments: Any, dump_s: float) -> None:
    os.setsid()
    faulthandler.dump_traceback_later(max(dump_s, 1), exit=False)
    why = ""
    try:
        call(lambda found: pipe.send(("told", found)), *arguments)
    except Exception as error:
        traceback.print_exc()
        why = repr(error)
    pipe.send(("end", why))


def rows_of(tell: Callable[[Report], None], module: str, quick: bool, full: bool) -> None:
    """Measures a topic, for :func:`bounded`."""
    report = Report(module)
    console = Console(stderr=True)
    options = Options(console, quick=quick, full=full, gate=Gate(patience_s=PATIENCE_S))
    for row in importlib.import_module(f"bench.{module}").rows(Run(options, report)):
        report.rows.append(row)
        tell(report)
    tell(report)


def why_no_gpu(tell: Callable[[str], None]) -> None:
    """Tells why no GPU can be used here; nothing: one can."""
    tell(gpu.why_not())


def measure_on_gpu(run: Run, topics: Mapping[str, str], bound_s: float) -> None:
    """As :func:`measure_apart`, where there is a GPU."""
    wanted = {name: module for name, module in topics.items() if run.options.wants(name)}
    if not wanted:
        return
    told, failed = bounded(why_no_gpu, (), START_S)  # no context is made in this process
    if why := told or failed:
        run.skip(", ".join(wanted), why)
        return
    measure_apart(run, wanted, bound_s)


def measure_apart(run: Run, topics: Mapping[str, str], bound_s: float) -> None:
    """As :func:`bench.topic.measure_all`; a topic that hangs is a bar that is missed, too.

    Its ``rows(run)`` may yield row by row: those before it hangs are kept.
    """
    options = run.options
    for name, module in topics.items():
        with options.step(name) as wanted:
            if not wanted:
                continue
            made, why = bounded(rows_of, (module, options.quick, options.full), bound_s)
            if made is not None:
                run.report.rows += made.rows
                run.report.skipped += made.skipped
                run.report.beside += made.beside
            if why:
                run.report.rows.append(Row(f"{name}: not measured: {why}", 0, "", ">=", 1))
