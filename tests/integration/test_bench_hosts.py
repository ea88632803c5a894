# SPDX-License-Identifier: Apache-2.0
"""transferctl bench between hosts with mutual TLS and networks of their own."""

from __future__ import annotations

import contextlib
import time
from typing import TYPE_CHECKING

import pytest

from transferd.client.ctl.bench.link import DEFAULT_PORT
from transferd.client.ctl.bench.report import Report

from support import netns
from support.bench import END_S, quiet, start
from support.waiting import eventually

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Iterator
    from pathlib import Path

    from support.daemon import DaemonProcess

WHY_NOT = netns.missing()
pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT)]

HEARTBEAT = {"interval": 0.25, "timeout": 2.0}
LEARNED_S = 2.0 + 6.0


class Cluster:
    """Hosts with a daemon each, and commands on them that are killed at the end."""

    def __init__(self, network: netns.Network, directory: Path, *rails: int) -> None:
        self.network = network
        self.hosts = [network.host(count) for count in rails]
        self.daemons: list[DaemonProcess] = []
        self.stack = contextlib.ExitStack()
        self._directory = directory
        for number, host in enumerate(self.hosts):
            place = directory / str(number)
            place.mkdir()
            daemon = host.daemon(place, directory / "tls", heartbeat=HEARTBEAT)
            self.daemons.append(self.stack.enter_context(daemon))

    def bench(self, number: int, *arguments: str) -> subprocess.Popen[bytes]:
        """Starts a command on a host."""
        process = start(*arguments, log=self.log(number), at=self.daemons[number])
        self.stack.callback(process.wait)
        self.stack.callback(process.kill)
        return process

    def log(self, number: int) -> Path:
        """Tells where a host's command writes to."""
        return self._directory / f"{number}.log"

    def serve(self, *arguments: str) -> str:
        """Starts the target on the first host; tells what initiators need."""
        self.bench(0, "--serve", *arguments)
        where = f"{self.hosts[0].addresses[0]}:{DEFAULT_PORT}"
        eventually(lambda: f"--to {where}\n" in self.log(0).read_text(), "it serves")
        return where


@contextlib.contextmanager
def cluster(directory: Path, *rails: int) -> Iterator[Cluster]:
    with netns.network() as network:
        made = Cluster(network, directory, *rails)
        with made.stack:
            yield made


def read(path: Path) -> Report:
    return Report.model_validate_json(path.read_text())


def test_two_hosts_to_one(short_tmp: Path) -> None:
    with cluster(short_tmp, 2, 1, 2) as made:
        where = made.serve("--initiators", "2")
        ends = [
            made.bench(
                number,
                *("--to", where, "--sizes", "4K,2M", "--op", "write,read", "--iterations", "20"),
                *("--pairs", "2", "--json", str(short_tmp / f"{number}.json")),
            )
            for number in (1, 2)
        ]
        for number, process in enumerate(ends, 1):
            assert process.wait(END_S) == 0, made.log(number).read_text()
        for number, rails in ((1, 1), (2, 2)):
            report = read(short_tmp / f"{number}.json")
            assert report.initiator.daemon is not None
            assert report.initiator.daemon.tls
            assert len(report.initiator.daemon.rails) == rails
            assert [row.hosts for row in report.rows] == [2] * 4
            assert max(path.rails for row in report.rows for path in row.paths) == rails
            assert not any("warning" in note or "rails that" in note for note in report.notes)
        told = made.log(0).read_text()
        assert told.count("Jain index") == 4
        assert "write of 2 MiB, 2 pairs: " in told
        quiet(*made.daemons[1:])


def test_a_network_that_falls_silent(short_tmp: Path) -> None:
    with cluster(short_tmp, 1, 1) as made:
        where = made.serve()
        process = made.bench(
            1,
            "--to",
            where,
            "--sizes",
            "4K,64M",
            "--iterations",
            "2000",
            "--in-flight",
            "2",
            "--json",
            str(short_tmp / "report.json"),
        )
        eventually(lambda: made.daemons[0].status().registered_bytes > 64 << 20, "second step")
        made.network.silence(made.hosts[0], 0)
        at_s = time.monotonic()
        assert process.wait(END_S) == 1
        assert time.monotonic() - at_s < LEARNED_S
        report = read(short_tmp / "report.json")
        assert [row.size_bytes for row in report.rows] == [4096]
        assert "the target is gone" in report.error
        eventually(lambda: "is gone" in made.log(0).read_text(), "the target knows, too")
        quiet(made.daemons[1])
        made.network.mend(made.hosts[0], 0)
        again = made.bench(1, "--to", where, "--sizes", "4K", "--iterations", "20")
        assert again.wait(END_S) == 0, made.log(1).read_text()


def test_a_port_that_cannot_be_reached(short_tmp: Path) -> None:
    with cluster(short_tmp, 1, 1) as made:
        where = made.serve()
        made.network.unplug(made.hosts[0], 0)
        process = made.bench(1, "--to", where)
        assert process.wait(END_S) == 1
        told = made.log(1).read_text()
        assert f"nothing answers at {where}" in told
        assert len(told.strip().splitlines()) == 1
