# SPDX-License-Identifier: Apache-2.0
"""A daemon that cannot start says why in a sentence, with what to do; its status tells, too."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml

import transferd
from transferd.native.names import JobStatus

from support.daemon import LOOPBACK, DaemonProcess
from support.waiting import WAIT_S

if TYPE_CHECKING:
    from collections.abc import Callable

    from conftest import MakeDaemon

pytestmark = pytest.mark.slow

ENVIRONMENT = {**os.environ, "PYTHONSAFEPATH": "1"}


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs `transferd` as a person would."""
    return subprocess.run(
        [sys.executable, "-m", "transferd", *arguments],
        capture_output=True,
        text=True,
        timeout=WAIT_S,
        env=ENVIRONMENT,
        check=False,
    )


def serve(directory: Path, **overrides: Any) -> str:
    """Starts a daemon that has to fail; returns its one sentence."""
    daemon = DaemonProcess(directory, overrides)
    return serve_text(directory, yaml.safe_dump(daemon.config))


def serve_text(directory: Path, text: str) -> str:
    """As :func:`serve`, from the text of a configuration file."""
    path = directory / "config.yaml"
    path.write_text(text)
    result = run("serve", "--config", str(path))
    told = [line for line in result.stderr.splitlines() if line.startswith("transferd: ")]
    assert result.returncode not in (0, None), result
    assert result.returncode > 0, f"killed by a signal: {result}"
    assert "Traceback" not in result.stderr + result.stdout, result.stderr
    assert len(told) == 1, result.stderr
    assert len(told[0]) < 400
    return told[0]


# ---- places that are taken ----


@pytest.mark.parametrize("key", ["peer_listen", "http_listen", "listen_tcp"])
def test_port_taken(short_tmp: Path, key: str) -> None:
    with socket.socket() as other:
        other.bind((LOOPBACK, 0))
        other.listen()
        address = f"{LOOPBACK}:{other.getsockname()[1]}"
        sentence = serve(short_tmp, **{key: address})
    assert key in sentence
    assert address in sentence
    assert "another port" in sentence


def test_heartbeat_port_taken(short_tmp: Path) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as other:
        other.bind((LOOPBACK, 0))
        address = f"{LOOPBACK}:{other.getsockname()[1]}"
        sentence = serve(short_tmp, peer_listen=address)
    assert "peer_listen" in sentence
    assert address in sentence


def test_address_of_nobody(short_tmp: Path) -> None:
    assert "http_listen" in serve(short_tmp, http_listen="192.0.2.1:8080")


def test_socket_in_use(make_daemon: MakeDaemon, short_tmp: Path) -> None:
    daemon = make_daemon()
    (short_tmp / "second").mkdir()
    sentence = serve(short_tmp / "second", listen=daemon.socket)
    assert "another transferd runs" in sentence
    assert daemon.socket.removeprefix("unix://") in sentence
    with transferd.Client(daemon.socket) as client:  # the first is not harmed
        assert client.alloc(4096)


def test_socket_of_another_program(short_tmp: Path) -> None:
    path = short_tmp / "transferd.sock"
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(path))
        other.listen()
        assert "another program listens" in serve(short_tmp)
    assert path.exists()


def test_file_in_the_place_of_the_socket(short_tmp: Path) -> None:
    path = short_tmp / "transferd.sock"
    path.write_text("precious")
    assert "no socket" in serve(short_tmp)
    assert path.read_text() == "precious"


def test_stale_socket_is_replaced(make_daemon: MakeDaemon) -> None:
    daemon = make_daemon()
    daemon.kill()
    assert Path(daemon.socket.removeprefix("unix://")).exists()
    daemon.start()
    with transferd.Client(daemon.socket) as client:
        assert client.alloc(4096)


def test_directory_that_cannot_be_made(short_tmp: Path) -> None:
    (short_tmp / "file").write_text("")
    sentence = serve(short_tmp, listen=f"unix://{short_tmp}/file/transferd.sock")
    assert "directory" in sentence


# ---- configuration ----


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("peer_lisen: 127.0.0.1:7471", ["peer_lisen", "no such key"]),
        ("heartbeat: {intervall: 1s}", ["heartbeat.intervall", "no such key"]),
        ("heartbeat: {timeout: soon}", ["heartbeat.timeout", "'soon'", "3s"]),
        ("heartbeat: {interval: 3s, timeout: 3s}", ["heartbeat", "twice"]),
        ("limits: {records: 1000}", ["limits.records", "power of two", "1000"]),
        ("limits: {sessions: 0}", ["limits.sessions", "0"]),
        ("provider: infiniband", ["provider", "infiniband"]),
        ("listen: /run/transferd.sock", ["listen", "unix:///run"]),
        ("listen: unix:///" + "d" * 120, ["listen", "bytes"]),
        ("peer_listen: 7471", ["peer_listen"]),
        ("peer_listen: 0.0.0.0:7471", ["peer_listen", "loopback", "tls"]),
        ("rails: [eth0]", ["rails", "loopback"]),
        ("tls: {cert: a.pem}", ["tls.cert"]),
        ("tenants: [{name: a, shm_paths: true}]", ["tenants[0]", "uids"]),
        ("log_level: verbose", ["log_level", "verbose"]),
        ("- a\n- b", ["keys and values"]),
        ("a: [", ["not YAML"]),
    ],
)
def test_typo_in_the_configuration(short_tmp: Path, text: str, words: list[str]) -> None:
    path = short_tmp / "config.yaml"
    path.write_text(text)
    for command in (["serve", "--config"], ["check-config"]):
        result = run(*command, str(path))
        assert result.returncode == 1
        assert "Traceback" not in result.stderr
        for word in [*words, str(path)]:
            assert word in result.stderr, result.stderr


def test_configuration_that_is_not_there(short_tmp: Path) -> None:
    result = run("serve", "--config", str(short_tmp / "none.yaml"))
    assert result.returncode == 1
    assert "cannot read" in result.stderr
    assert "Traceback" not in result.stderr


# ---- provider ----


@pytest.mark.parametrize("library", ["/nonexistent/libfabric.so.1", "libnothing-at-all.so.9"])
def test_libfabric_missing(short_tmp: Path, library: str) -> None:
    sentence = serve(short_tmp, fabric={"library": library})
    assert library in sentence


def test_library_that_is_not_libfabric(short_tmp: Path) -> None:
    libc = next(Path("/lib").glob("*/libc.so.6"))
    assert str(libc) in serve(short_tmp, fabric={"library": str(libc)})


def test_fabric_that_is_not_there(short_tmp: Path) -> None:
    assert "nothing" in serve(short_tmp, fabric={"name": "nothing"})


def test_rail_that_is_not_there(short_tmp: Path) -> None:
    tls = certificates(short_tmp / "certs")
    assert "nosuch0" in serve(short_tmp, tls=tls, rails=["nosuch0"])


# ---- certificates ----


def certificates(directory: Path, name: str = "host", host: str = LOOPBACK) -> dict[str, str]:
    """Makes development certificates with `transferd certs`; returns the tls section."""
    result = run("certs", str(directory), "--name", name, "--host", host)
    assert result.returncode == 0, result.stderr
    section: dict[str, str] = yaml.safe_load(result.stdout)["tls"]
    return section


def damaged(text: str) -> Callable[[Path], None]:
    return lambda path: (path.write_text(text), None)[1]


@pytest.mark.parametrize("key", ["cert", "key", "ca"])
@pytest.mark.parametrize(
    "damage", [Path.unlink, damaged("no PEM"), damaged("")], ids=["missing", "no PEM", "empty"]
)
def test_file_of_tls_is_wrong(short_tmp: Path, key: str, damage: Callable[[Path], None]) -> None:
    tls = certificates(short_tmp / "certs")
    damage(Path(tls[key]))
    sentence = serve(short_tmp, tls=tls)
    assert "tls." in sentence
    assert tls[key] in sentence


def test_key_of_another_certificate(short_tmp: Path) -> None:
    one, other = (certificates(short_tmp / "certs", name) for name in ("one", "other"))
    sentence = serve(short_tmp, tls=one | {"key": other["key"]})
    assert "no matching certificate and key" in sentence


def test_certificate_of_another_ca(short_tmp: Path) -> None:
    mine, other = certificates(short_tmp / "mine"), certificates(short_tmp / "other")
    sentence = serve(short_tmp, tls=mine | {"ca": other["ca"]})
    assert "not accepted by the CA" in sentence


def test_certs_never_replace(short_tmp: Path) -> None:
    tls = certificates(short_tmp / "certs")
    before = Path(tls["key"]).read_bytes()
    result = run("certs", str(short_tmp / "certs"), "--name", "host")
    assert result.returncode == 1
    assert "exists" in result.stderr
    assert Path(tls["key"]).read_bytes() == before
    assert Path(tls["key"]).stat().st_mode & 0o077 == 0


def moves(near: DaemonProcess, far: DaemonProcess) -> None:
    with transferd.Client(near.socket) as sender, transferd.Client(far.socket) as receiver:
        source, target = sender.alloc(1 << 20), receiver.alloc(1 << 20)
        source.view[:] = os.urandom(1 << 20)
        grant = target.grant(imms=[1])
        assert sender.write(source, grant.descriptor, imm=1).wait(WAIT_S) is JobStatus.OK
        receiver.counter(1).wait(1, WAIT_S)
        assert source.view == target.view


def test_pair_over_tls(make_daemon: MakeDaemon, short_tmp: Path) -> None:
    one, two = (certificates(short_tmp / "certs", name) for name in ("one", "two"))
    near, far = make_daemon(tls=one), make_daemon(tls=two)
    assert near.status().tls
    assert not any("evelopment" in warning for warning in near.status().warnings)
    moves(near, far)
    moves(far, near)


@pytest.mark.parametrize("stranger", ["other CA", "no TLS", "wrong name"])
def test_stranger_is_refused(make_daemon: MakeDaemon, short_tmp: Path, stranger: str) -> None:
    """A stranger opens nothing here, and nobody here opens what is a stranger's."""
    good = make_daemon(tls=certificates(short_tmp / "certs", "good"))
    if stranger == "other CA":
        other = make_daemon(tls=certificates(short_tmp / "elsewhere", "bad"))
    elif stranger == "no TLS":
        other = make_daemon()
    else:
        other = make_daemon(tls=certificates(short_tmp / "certs", "named", "example.invalid"))
    with transferd.Client(good.socket) as mine, transferd.Client(other.socket) as theirs:
        grants = [client.alloc(4096).grant(imms=[1]) for client in (mine, theirs)]
        with pytest.raises(transferd.PeerLost) as caught:
            mine.imm(grants[1].descriptor, 1).wait(WAIT_S)
        assert other.peer_address in str(caught.value)
        with contextlib.ExitStack() as stack:
            if stranger != "wrong name":  # that one is of our CA: its calls to us are genuine
                stack.enter_context(pytest.raises(transferd.PeerLost))
                theirs.imm(grants[0].descriptor, 1).wait(WAIT_S)
        assert mine.counter(1).value == 0
