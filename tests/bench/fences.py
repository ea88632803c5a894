# SPDX-License-Identifier: Apache-2.0
"""Fences: canaries that no late byte may change, and how soon a fence is answered."""

from __future__ import annotations

import contextlib
import functools
import os
import re
import signal
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING

import transferd
from bench.limited import limited_daemons
from bench.pair import daemons
from bench.report import Row
from bench.stats import median
from transferd.v1 import admin_pb2, admin_pb2_grpc

from support import netns
from support.actor import Actor
from support.canary import KINDS, Canary
from support.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import Callable

    from bench.options import Options
    from bench.report import Report
    from transferd import Client, Grant, Job

    from support.daemon import DaemonProcess

NATIVE = Path(__file__).resolve().parents[2] / "native"
MIB = 1 << 20
RUNS, STOPPED_RUNS = 1000, 100
NATIVE_KINDS = ("cancel", "revoke", "fence", "reset")
FABRICS = ("libfabric", "tcp", "local", "sim, ordered", "sim, unordered")
LINE = re.compile(r"(?P<fabric>.+): (?P<kind>\w+): runs=(?P<runs>\d+) caught=(?P<caught>\d+)")
IDLE_MS, LOADED_MS = 2.0, 20.0
IDLE_TIMES, LOADED_TIMES = 300, 50
WAIT_S = 20.0
FENCED, LOAD = 7, 1


# ---- canaries ----


def native_canaries(options: Options, report: Report) -> None:
    """Runs native/tests/test_canary.c: every fence on every fabric of the core."""
    subprocess.run(
        ["make", "-s", "-C", str(NATIVE), "check", "TESTS=canary"], check=True, capture_output=True
    )
    done = subprocess.run(
        [str(NATIVE.parent / "build/native/gcc/tests/test_canary")],
        check=False,
        capture_output=True,
        text=True,
        env={**os.environ, "TFD_CANARY_RUNS": str(options.scaled(RUNS))},
    )
    seen = {(m["fabric"], m["kind"]): m for m in map(LINE.match, done.stdout.splitlines()) if m}
    for fabric in FABRICS:
        for kind in NATIVE_KINDS:
            match = seen.get((fabric, kind))
            note = (
                f"{match['caught']} met jobs in flight"
                if match
                else done.stderr.strip() or f"status {done.returncode}"
            )
            runs = float(match["runs"]) if match else 0.0
            report.rows.append(_canary_row(f"{fabric}, core: {kind}", runs, RUNS, note))


def daemon_canaries(options: Options, report: Report) -> None:
    """Rounds through SDK and daemons, between two of them and within one."""
    with daemons(2) as (near, far):
        for name, there in (("two daemons", far), ("one daemon", near)):
            for kind in KINDS:
                with (
                    transferd.Client(near.socket) as sender,
                    transferd.Client(there.socket) as receiver,
                ):
                    runs, note = _rounds(kind, sender, receiver, options.scaled(RUNS))
                report.rows.append(_canary_row(f"{name}: {kind}", runs, RUNS, note))


def _rounds(kind: str, sender: Client, receiver: Client, count: int) -> tuple[int, str]:
    canary = Canary(kind, sender, receiver)
    try:
        with canary:
            canary.run(count)
    except AssertionError as error:
        return 0, str(error)
    return canary.rounds, f"{canary.caught} met jobs in flight"


def stopped_canaries(options: Options, report: Report) -> None:
    """The opener stands still while the fence is asked for, and wakes after the answer."""
    count = options.scaled(STOPPED_RUNS)
    for kind in ("revoke", "fence"):
        with (
            daemons(2, timeouts={"revoke": 0.1}) as (near, far),
            transferd.Client(near.socket) as sender,
            transferd.Client(far.socket) as receiver,
        ):
            runs, lost = _stopped(near, sender, receiver, kind, count)
        note = f"{lost} woke with jobs in flight"
        report.rows.append(
            _canary_row(f"two daemons, opener stopped: {kind}", runs, STOPPED_RUNS, note)
        )


def _stopped(
    near: DaemonProcess, sender: Client, receiver: Client, kind: str, count: int
) -> tuple[int, int]:
    """Rounds with SIGSTOP and SIGCONT; returns the good ones, and those that broke jobs."""
    length, lost = 8 * MIB, 0
    source, region = sender.alloc(length), receiver.alloc(length)
    source.numpy()[:] = 0xFF
    pages = region.numpy()
    for number in range(count):
        grant = region.grant(imms=[FENCED])
        _try(functools.partial(sender.warm, grant.descriptor))
        jobs = [sender.write(source, grant.descriptor, imm=FENCED) for _ in range(8)]
        _all_in_flight(sender, grant)
        os.kill(near.pid, signal.SIGSTOP)
        try:
            grant.fence([FENCED]) if kind == "fence" else grant.revoke()
            pages[:] = number % 255
        finally:
            os.kill(near.pid, signal.SIGCONT)
        for job in jobs:
            with contextlib.suppress(transferd.TransferdError):
                job.wait(WAIT_S)
        lost += jobs[-1].status.name != "OK"
        # By the time that a new write has landed the old ones would have, too.
        later = receiver.alloc(4096).grant(imms=[LOAD])
        _try(functools.partial(_count, sender, later.descriptor))
        if (pages != number % 255).any():
            return number, lost
        grant.revoke()
    return count, lost


def _count(sender: Client, descriptor: bytes) -> None:
    sender.imm(descriptor, LOAD).wait(WAIT_S)


def _all_in_flight(sender: Client, grant: Grant) -> None:
    """Bulk jobs share the path: when a later small write has landed, all of them are under way."""
    sender.imm(grant.descriptor, FENCED, priority="latency").wait(WAIT_S)


def _try(call: Callable[[], object]) -> None:
    """Repeats what fails while two daemons find out that their relation is over."""

    def works() -> bool:
        try:
            call()
        except transferd.PeerLost:
            return False
        return True

    eventually(works, "the two begin anew", WAIT_S)


def _canary_row(what: str, runs: float, wanted: int, note: str) -> Row:
    return Row(f"canary runs without a late byte, {what}", float(runs), "", ">=", wanted, note)


# ---- answers ----


def idle_answers(options: Options, report: Report) -> None:
    """Times fences where nothing else is in flight."""
    with (
        daemons(2) as (near, far),
        transferd.Client(near.socket) as sender,
        transferd.Client(far.socket) as receiver,
    ):
        pair = _Timed(sender, receiver, 64 << 10, 1)
        options.gate.wait()
        for kind in KINDS:
            took = [pair.take(kind) for _ in range(options.scaled(IDLE_TIMES))]
            report.rows.append(_answer_row(f"{kind} on an idle pair", took, IDLE_MS))


def loaded_answers(options: Options, report: Report) -> None:
    """Times fences of 16 MiB in flight beside another client's flood, on 1 Gbit/s."""
    why = netns.missing()
    if why:
        report.skipped.append(("fences under bulk load on a 1 Gbit/s rail", why))
        return
    with (
        limited_daemons(1) as (near, far),
        transferd.Client(near.socket) as sender,
        transferd.Client(far.socket) as receiver,
    ):
        pair = _Timed(sender, receiver, 4 * MIB, 4)
        load = receiver.alloc(4 * MIB).grant(imms=[LOAD])
        counter = receiver.counter(LOAD)
        with Actor("send", near.socket, 4 * MIB, LOAD, load.descriptor) as flood:
            flood.sending()
            counter.wait(8, WAIT_S)
            begin, before = time.monotonic(), _sent(near)
            for kind in KINDS:
                took = [pair.take(kind) for _ in range(options.scaled(LOADED_TIMES))]
                what = f"{kind} under bulk load on a 1 Gbit/s rail"
                report.rows.append(_answer_row(what, took, LOADED_MS))
            gbps = (_sent(near) - before) * 8 / (time.monotonic() - begin) / 1e9
            report.beside.append(("what the rail carried meanwhile", f"{gbps:.2f} Gbps"))


def _sent(daemon: DaemonProcess) -> int:
    """Bytes that a daemon's rails have sent and were acknowledged."""
    with daemon.channel() as channel:
        stub = admin_pb2_grpc.AdminServiceStub(channel)
        rails = stub.ListRails(admin_pb2.ListRailsRequest(), timeout=WAIT_S).rails
    return sum(rail.bytes_sent for rail in rails)


class _Timed:
    """Times one fence of each kind, with `count` jobs of `size` in flight."""

    def __init__(self, sender: Client, receiver: Client, size: int, count: int) -> None:
        self._sender, self._size, self._count = sender, size, count
        self._source = sender.alloc(size)
        self._region = receiver.alloc(size)
        self._grant = self._region.grant(imms=[FENCED])
        sender.warm(self._grant.descriptor)
        self._write(self._grant)[0].wait(WAIT_S)
        self._grant.fence([FENCED])  # the owner's first call to the opener makes its channel

    def _write(self, grant: Grant) -> list[Job]:
        return [
            self._sender.write(self._source, grant.descriptor, imm=FENCED)
            for _ in range(self._count)
        ]

    def take(self, kind: str) -> float:
        """Makes one; returns its milliseconds."""
        grant = self._grant
        if kind == "revoke":
            grant = self._region.grant(imms=[FENCED])
            self._sender.warm(grant.descriptor)
        jobs = self._write(grant)
        if self._count > 1:
            _all_in_flight(self._sender, grant)
        begin = time.perf_counter()
        if kind == "cancel":
            jobs[0].cancel(WAIT_S)
        elif kind == "revoke":
            grant.revoke()
        else:
            grant.fence([FENCED])
        took = time.perf_counter() - begin
        for job in jobs:
            with contextlib.suppress(transferd.JobFailed):
                job.wait(WAIT_S)
        return took * 1e3


def _answer_row(what: str, took: list[float], limit: float) -> Row:
    took = sorted(took)
    note = f"p90 {took[int(len(took) * 0.9)]:.2f}, largest {took[-1]:.2f} of {len(took)}"
    return Row(f"{what} answered", median(took), "ms", "<=", limit, note)
