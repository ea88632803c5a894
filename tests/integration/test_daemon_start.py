# SPDX-License-Identifier: Apache-2.0
"""A start that fails says in one sentence what to do; a stop leaves nothing behind."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import transferd
from transferd.client.demo.daemons import free_port

from support.daemon import LOOPBACK, DaemonProcess

if TYPE_CHECKING:
    from collections.abc import Callable

    from conftest import MakeDaemon

pytestmark = pytest.mark.slow


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs `transferd` to its end."""
    return subprocess.run(
        [sys.executable, "-m", "transferd.daemon.main", *arguments],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )


def refusal(directory: Path, **overrides: Any) -> str:
    """Starts a daemon that must refuse, and returns what it said."""
    daemon = DaemonProcess(directory, overrides)
    process = daemon.spawn()
    assert process.wait(30) == 1, daemon.log()
    lines = [line for line in daemon.log().splitlines() if not line.startswith("{")]
    assert len(lines) == 1, daemon.log()
    assert "Traceback" not in daemon.log()
    assert lines[0].startswith("transferd: ")
    return lines[0]


def test_peer_port_taken(short_tmp: Path) -> None:
    with socket.socket() as taken:
        taken.bind((LOOPBACK, 0))
        taken.listen()
        said = refusal(short_tmp, peer_listen=f"{LOOPBACK}:{taken.getsockname()[1]}")
    assert "peer_listen" in said
    assert "choose another port" in said


def test_heartbeat_port_taken(short_tmp: Path) -> None:
    with socket.socket(type=socket.SOCK_DGRAM) as taken:
        taken.bind((LOOPBACK, 0))
        said = refusal(short_tmp, peer_listen=f"{LOOPBACK}:{taken.getsockname()[1]}")
    assert "heartbeats" in said


def test_http_port_taken(short_tmp: Path) -> None:
    with socket.socket() as taken:
        taken.bind((LOOPBACK, 0))
        taken.listen()
        said = refusal(short_tmp, http_listen=f"{LOOPBACK}:{taken.getsockname()[1]}")
    assert "http_listen" in said


def test_two_daemons_at_one_socket(make_daemon: MakeDaemon, short_tmp: Path) -> None:
    first = make_daemon()
    second = short_tmp / "second"
    second.mkdir()
    assert "another transferd runs" in refusal(second, listen=first.socket)
    assert first.status().state == "SERVING"


def test_another_program_at_the_socket(short_tmp: Path) -> None:
    for suffix, kind in (("", socket.SOCK_STREAM), (".fd", socket.SOCK_SEQPACKET)):
        directory = short_tmp / f"of{suffix}"
        directory.mkdir()
        with socket.socket(socket.AF_UNIX, kind) as taken:
            taken.bind(str(directory / f"transferd.sock{suffix}"))
            taken.listen()
            assert "another program listens" in refusal(directory)


def test_stale_sockets_are_removed(make_daemon: MakeDaemon) -> None:
    daemon = make_daemon()
    daemon.kill()
    assert Path(daemon.socket.removeprefix("unix://")).exists()
    daemon.restart()
    assert daemon.status().state == "SERVING"


def test_file_in_the_sockets_place(short_tmp: Path) -> None:
    (short_tmp / "transferd.sock").write_text("precious")
    assert "no socket" in refusal(short_tmp)
    assert (short_tmp / "transferd.sock").read_text() == "precious"


def test_libfabric_missing(short_tmp: Path) -> None:
    said = refusal(short_tmp, fabric={"library": "/nowhere/libfabric.so.1"})
    assert "libfabric" in said
    assert "install" in said


def test_rail_that_does_not_exist(short_tmp: Path) -> None:
    assert "no-such-rail" in refusal(
        short_tmp, rails=["no-such-rail"], tls=None, peer_listen=f"{LOOPBACK}:{free_port()}"
    )


@pytest.mark.parametrize(
    ("break_it", "key"),
    [
        (lambda d: (d / "host.key").unlink(), "tls.key"),
        (lambda d: (d / "host.crt").write_text("nonsense"), "tls.cert"),
        (lambda d: (d / "ca.crt").write_text("nonsense"), "tls.ca"),
        (lambda d: (d / "ca.crt").write_bytes((d / "other" / "ca.crt").read_bytes()), "tls.cert"),
        (
            lambda d: (d / "host.key").write_bytes((d / "other" / "host.key").read_bytes()),
            "tls.cert",
        ),
    ],
    ids=["no key", "bad certificate", "bad CA", "of another CA", "of another key"],
)
def test_wrong_certificates(
    short_tmp: Path, tmp_path: Path, break_it: Callable[[Path], object], key: str
) -> None:
    keys = tmp_path / "keys"
    for directory in (keys, keys / "other"):
        assert run("certs", str(directory)).returncode == 0
    break_it(keys)
    tls = {"cert": f"{keys}/host.crt", "key": f"{keys}/host.key", "ca": f"{keys}/ca.crt"}
    assert key in refusal(short_tmp, tls=tls)


def test_typo_in_the_configuration(short_tmp: Path) -> None:
    assert "lissten: no such key" in refusal(short_tmp, lissten="unix:///x")


def test_check_config(tmp_path: Path) -> None:
    good, bad = tmp_path / "good.yaml", tmp_path / "bad.yaml"
    good.write_text("log_level: info\n")
    bad.write_text("log_level: loud\nheartbeat: {interval: x}\n")
    assert run("check-config", str(good)).returncode == 0
    done = run("check-config", str(bad))
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 2
    assert "heartbeat.interval" in done.stderr
    assert run("check-config").returncode == 2
    assert run("serve", "--confg", "x").returncode == 2
    missing = run("serve", "--config", str(tmp_path / "none.yaml"))
    assert missing.returncode == 1
    assert "cannot read" in missing.stderr


def test_examples_are_correct(tmp_path: Path) -> None:
    examples = Path(__file__).parents[2] / "deploy" / "examples"
    found = sorted(examples.glob("*.yaml"))
    assert found
    for example in found:
        done = run("check-config", str(example))
        assert done.returncode == 0, done.stderr


def test_certificates_are_never_overwritten(tmp_path: Path) -> None:
    assert run("certs", str(tmp_path / "k")).returncode == 0
    before = (tmp_path / "k" / "host.key").read_bytes()
    again = run("certs", str(tmp_path / "k"))
    assert again.returncode == 1
    assert "exists" in again.stderr
    assert (tmp_path / "k" / "host.key").read_bytes() == before
    assert (tmp_path / "k" / "host.key").stat().st_mode & 0o077 == 0
    assert run("certs", str(tmp_path / "k"), "--name", "second").returncode == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_clean_stop_with_sessions(make_daemon: MakeDaemon, number: signal.Signals) -> None:
    near, far = make_daemon(), make_daemon()
    with transferd.Client(near.socket) as sender, transferd.Client(far.socket) as receiver:
        grant = receiver.alloc(4096).grant(imms=[1])
        sender.write(sender.alloc(4096), grant.descriptor, imm=1).wait(10)
        os.kill(far.pid, number)
        started = time.monotonic()
        assert far._process is not None
        assert far._process.wait(10) == 0, far.log()
        assert time.monotonic() - started < 5
        assert '"stopped"' in far.log()
        with pytest.raises(transferd.TransferdError):
            receiver.counter(1).wait(2, 5)
        assert near.status().state == "SERVING"


def test_http_port(make_daemon: MakeDaemon) -> None:
    daemon = make_daemon()

    def get(path: str) -> tuple[int, str]:
        try:
            with urllib.request.urlopen(f"http://{daemon.http_address}{path}", timeout=5) as reply:
                return reply.status, reply.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    with transferd.Client(daemon.socket) as client:
        grant = client.alloc(8192).grant(imms=[1])
        client.write(client.alloc(4096), grant.descriptor, imm=1).wait(10)
        assert get("/livez") == (200, "alive\n")
        assert get("/readyz") == (200, "ready\n")
        assert get("/nothing")[0] == 404
        status, text = get("/metrics")
        assert status == 200
        assert 'transferd_sessions{state="open",tenant="default"} 1.0' in text
        assert 'transferd_registered_bytes{tenant="default"} 12288.0' in text
        assert "transferd_grants 1.0" in text
        assert "transferd_rail_writes_total{provider=" in text


def test_http_port_survives_bad_clients(make_daemon: MakeDaemon) -> None:
    daemon = make_daemon()
    host, port = daemon.http_address.split(":")
    lazy = []
    for _ in range(40):
        sock = socket.create_connection((host, int(port)), timeout=5)
        sock.sendall(b"GET /metrics HTT")
        lazy.append(sock)
    with socket.create_connection((host, int(port)), timeout=5) as sock:
        sock.sendall(b"\xff\x00 garbage\r\n\r\n" * 100)
    for sock in lazy:
        sock.close()
    deadline = time.monotonic() + 5
    while True:
        try:
            with urllib.request.urlopen(f"http://{daemon.http_address}/livez", timeout=5) as reply:
                assert reply.status == 200
            break
        except (urllib.error.URLError, ConnectionError):
            assert time.monotonic() < deadline
            time.sleep(0.05)


def test_state_survives_restarts(make_daemon: MakeDaemon, short_tmp: Path) -> None:
    daemon = make_daemon(state_dir=str(short_tmp / "state"))
    first = daemon.status()
    second = daemon.restart().status()
    assert first.daemon_id == second.daemon_id
    assert first.boot_epoch != second.boot_epoch
    daemon.stop()
    (short_tmp / "state" / "secret").write_bytes(b"short")
    other = short_tmp / "other"
    other.mkdir()
    assert "damaged" in refusal(other, state_dir=str(short_tmp / "state"))


def test_tenants_have_sockets_of_their_own(short_tmp: Path) -> None:
    directory = short_tmp / "daemon"
    directory.mkdir()
    daemon = DaemonProcess(
        directory,
        {
            "tenants": [
                {"name": "a", "uids": [os.getuid()]},
                {"name": "b", "socket_dir": str(short_tmp / "b"), "quotas": {"sessions": 1}},
                {"name": "c", "socket_dir": str(short_tmp / "c"), "uids": [os.getuid() + 1]},
            ]
        },
    )
    with daemon:
        with (
            transferd.Client(daemon.socket) as a,
            transferd.Client(f"unix://{short_tmp}/b/transferd.sock") as b,
        ):
            grant = b.alloc(4096).grant(imms=[1])
            a.write(a.alloc(4096), grant.descriptor, imm=1).wait(10)
            with pytest.raises(transferd.QuotaExceeded):
                transferd.Client(f"unix://{short_tmp}/b/transferd.sock")
        with pytest.raises(transferd.TransferdError, match="may not use tenant c"):
            transferd.Client(f"unix://{short_tmp}/c/transferd.sock")
