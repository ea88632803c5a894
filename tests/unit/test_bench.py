# SPDX-License-Identifier: Apache-2.0
"""transferctl bench: sizes, steps, shapes, percentiles, patterns, pictures; without a daemon."""

from __future__ import annotations

import json
import random
import socket
import threading
from typing import TYPE_CHECKING, Any

import click
import numpy as np
import pydantic
import pytest
from click.testing import CliRunner

import transferd
from transferd.client import errors
from transferd.client.ctl.bench import link, messages, plot
from transferd.client.ctl.bench.command import bench_command
from transferd.client.ctl.bench.machine import Daemon, Machine, Rail
from transferd.client.ctl.bench.pattern import CHUNK, Pattern
from transferd.client.ctl.bench.report import SCHEMA, Path, Report, Row, jain, path_notes, spread
from transferd.client.ctl.bench.shapes import SHAPES
from transferd.client.ctl.bench.sweep import (
    MANY_TO_ONE,
    PAIRS,
    Asked,
    Settings,
    SizesType,
    doubling,
    parse_size,
    plan,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

MIB = 1 << 20


def settings(**changed: Any) -> Settings:
    values: dict[str, Any] = {
        "seconds": 1.0,
        "iterations": 0,
        "warm_up": 1,
        "repeats": 1,
        "in_flight": 8,
        "memory": 256 * MIB,
        "working_set": 0,
        "priority": "bulk",
        "checksum": False,
        "seed": 1,
    }
    return Settings(**{**values, **changed})


# ---- sizes and steps ----


@pytest.mark.parametrize(
    ("text", "size"),
    [("1", 1), ("4K", 4096), ("4k", 4096), ("64MiB", 64 * MIB), ("2 GB", 2 << 30), (" 7b ", 7)],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "many", "4X", "-4K", "4.5M", "K", "4K4", "0x10"])
def test_no_sizes(text: str) -> None:
    with pytest.raises(ValueError, match="is not a size"):
        parse_size(text)


def test_sweeps() -> None:
    sizes = SizesType()
    assert sizes("4K-64M", None, None) == tuple(4096 << i for i in range(15))
    assert sizes("1,4K-16K,8K", None, None) == (1, 4096, 8192, 16384)
    assert doubling(3, 13) == (3, 6, 12, 13)
    assert doubling(5, 5) == (5,)
    for text in ("4K-1K", "0", "1-0", "4K-", "-4K", "2T", "4K,,1M"):
        with pytest.raises(click.BadParameter):
            sizes(text, None, None)


def test_steps_are_cut_to_the_memory() -> None:
    asked = Asked(("write", "imm"), (4096, 32 * MIB), (1, 16), ((PAIRS, 1), (MANY_TO_ONE, 4)))
    steps, notes = plan(asked, settings(), 1 << 40)
    found = {(s.initiators, s.operation, s.size, s.batch): s.slots for s in steps}
    assert found[1, "write", 4096, 1] == 8
    assert found[1, "write", 32 * MIB, 1] == 8
    assert found[4, "write", 32 * MIB, 1] == 2  # 64 MiB each
    assert (1, "write", 32 * MIB, 16) not in found
    assert [key for key in found if key[1] == "imm"] == [
        (count, "imm", 0, batch) for count in (1, 4) for batch in (1, 16)
    ]
    assert [s.number for s in steps] == list(range(len(steps)))
    assert all(s.length * s.initiators <= 256 * MIB for s in steps)
    assert len(notes) == 2
    assert all("16 x 32 MiB" in note and "--memory" in note for note in notes)


def test_little_memory_on_the_host_is_said() -> None:
    asked = Asked(("write",), (4096, 32 * MIB), (1,), ((PAIRS, 1),))
    steps, (note,) = plan(asked, settings(), 16 * MIB)
    assert [step.size for step in steps] == [4096]
    assert "this host has 16 MiB available" in note


def test_working_set() -> None:
    asked = Asked(("write",), (4096, MIB), (2,), ((PAIRS, 1),))
    steps, _ = plan(asked, settings(working_set=64 * MIB), 1 << 40)
    assert [step.slots * step.slot_bytes for step in steps] == [64 * MIB, 64 * MIB]


def test_a_working_set_of_too_many_operations_is_cut() -> None:
    asked = Asked(("write",), (1, 64 << 10), (1,), ((PAIRS, 1),))
    (tiny, small), (note,) = plan(asked, settings(working_set=128 << 10), 1 << 40)
    assert (tiny.slots, small.slots) == (65_536, 8)
    assert note == "1 B: the working set is 64 KiB, not 128 KiB: 65,536 operations are prepared"
    asked = Asked(("write",), (1,), (4096,), ((PAIRS, 1),))
    (step,), _ = plan(asked, settings(in_flight=256), 1 << 40)
    assert step.slots == 16


@pytest.mark.parametrize(
    ("name", "pages", "page_bytes"),
    [
        ("deepseek-r1-block", 5958, 576 << 10),
        ("deepseek-r1-layer", 23_829, 144 << 10),
        ("deepseek-r1-pp32", 119_141, 288 << 10),
        ("deepseek-r1-page512", 1490, 2_359_296),
        ("llama-3.1-8b", 20_000, 64 << 10),
        ("llama-3.1-70b-tp8", 50_000, 8 << 10),
        ("llama-3.1-405b-tp8", 78_750, 8 << 10),
    ],
)
def test_shapes(name: str, pages: int, page_bytes: int) -> None:
    shape = SHAPES[name]
    assert (shape.pages, shape.page_bytes) == (pages, page_bytes)
    asked = Asked((), (), (), ((PAIRS, 1),), (shape,))
    (step,), _ = plan(asked, settings(), 1 << 40)
    assert step.size == page_bytes
    assert step.batch == min(pages, 256 * MIB // page_bytes)
    assert (step.shape, step.shape_pages, step.operation) == (name, pages, "pages")
    whole = pages * page_bytes
    (step,), _ = plan(asked, settings(memory=whole), 1 << 50)
    assert (step.batch, step.slots) == (pages, 1)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "say which end this is"),
        (["--loopback", "--to", "a:1"], "say which end this is"),
        (["--loopback", "--once"], "--once goes with --serve"),
        (["--serve", "--op", "read"], "--op is for the other end"),
        (["--serve", "--listen", "here"], "is not HOST:PORT"),
        (["--loopback", "--sizes", "many"], "'many' is not a size"),
        (["--loopback", "--sizes", "1M-4K"], "write 4K-1M"),
        (["--loopback", "--op", "erase"], "'erase' is not one of"),
        (["--loopback", "--in-flight", "0"], "--in-flight"),
        (["--loopback", "--seconds", "nan"], "'nan' is not a number of seconds"),
        (["--loopback", "--pairs", "65"], "--pairs"),
        (["--loopback", "--batch", "0"], "--batch"),
        (["--loopback", "--shape", "gpt"], "'gpt' is not one of"),
        (["--loopback", "--shape", "llama-3.1-8b", "--sizes", "4K"], "--shape says"),
        (["--loopback", "--op", "read", "--checksum"], "--checksum goes with"),
        (["--to", "nonsense"], "nor is it a token"),
    ],
)
def test_wrong_usage(arguments: list[str], said: str) -> None:
    done = CliRunner().invoke(bench_command, arguments)
    assert done.exit_code == 2
    assert said in done.output


def test_help_says_how_to_begin() -> None:
    told = CliRunner().invoke(bench_command, ["--help"]).output
    assert "transferctl bench --serve" in told
    assert "transferctl bench --to host1:7473" in told
    assert "deepseek-r1-block" in told


# ---- figures ----


def test_percentiles() -> None:
    times = list(range(1_000, 1_002_000, 1_000))  # 1 to 1,001 us
    random.Random(3).shuffle(times)
    found = spread(times)
    assert found.count == 1001
    assert (found.p50, found.p99, found.p999, found.max) == pytest.approx((501, 991, 1000, 1001))
    assert found.mean == pytest.approx(501)
    one = spread([7000])
    assert (one.count, one.p50, one.p99, one.p999, one.max) == (1, 7, 7, 7, 7)
    two = spread([1000, 3000])
    assert two.p50 == pytest.approx(2)
    assert 2.9 < two.p99 <= two.p999 <= two.max == 3
    for time in (17_004, 17_010, 17_013):  # of 17.004 three times, 17.004000000000001 would be one
        assert spread([time] * 3).p999 == time / 1000


def test_fairness() -> None:
    assert jain([5.0, 5.0, 5.0]) == pytest.approx(1)
    assert jain([7.0, 0.0, 0.0, 0.0]) == pytest.approx(0.25)
    assert jain([1.0, 3.0]) == pytest.approx(0.8)
    assert jain([0.0, 0.0]) == 1


# ---- patterns ----


def test_pattern_is_the_same_from_everywhere() -> None:
    pattern = Pattern(1, 2, 3)
    whole = pattern.at(0, 1000)
    assert all(pattern.at(at, 99) == whole[at : at + 99] for at in (0, 1, 15, 16, 17, 500))
    assert pattern.at(5, 0) == b""
    others = (Pattern(2, 2, 3), Pattern(1, 3, 3), Pattern(1, 2, 4))
    assert len({whole, *(other.at(0, 1000) for other in others)}) == 4
    assert len({whole[at : at + 8] for at in range(0, 1000, 8)}) == 125


@pytest.mark.parametrize("at", [0, 1, CHUNK - 1, CHUNK, CHUNK + 17, 2 * CHUNK + 4])
def test_every_wrong_byte_is_found(at: int) -> None:
    pattern = Pattern(9, 9, 9)
    view = memoryview(bytearray(2 * CHUNK + 5))
    pattern.fill(view)
    assert pattern.difference(view) is None
    ought = view[at]
    view[at] ^= 0x10
    if at < 2 * CHUNK:
        view[2 * CHUNK + 2] ^= 1  # a later one does not hide it
    assert pattern.difference(view) == (at, ought ^ 0x10, ought)
    assert pattern.difference(view[:at]) is None


# ---- how the ends find each other ----


@pytest.mark.parametrize("length", range(1, 40))
def test_tokens(length: int) -> None:
    descriptor = bytes(range(200, 200 + length))
    token = link.to_token(descriptor)
    assert token.startswith("tfb1:")
    assert not set("+/= \n") & set(token)
    assert link.from_token(f" {token}\n") == descriptor


@pytest.mark.parametrize("token", ["tfb1:a", "tfb1:äöü", "tfb1:ab cd", "tfb1:abcde"])
def test_tokens_that_were_not_copied_whole(token: str) -> None:
    with pytest.raises(transferd.InvalidRequest, match="not copied whole"):
        link.from_token(token)


@pytest.mark.parametrize(
    ("text", "host", "port"),
    [("a.example:7473", "a.example", 7473), ("[::1]:0", "::1", 0), ("10.0.0.1:1", "10.0.0.1", 1)],
)
def test_host_port(text: str, host: str, port: int) -> None:
    assert link.split_host_port(text) == (host, port)
    assert link.join_host_port(host, port) == text


@pytest.mark.parametrize("text", ["", "host", "host:", ":1", "host:99999", "a b:1", "::1:7"])
def test_no_host_port(text: str) -> None:
    with pytest.raises(ValueError, match="HOST:PORT"):
        link.split_host_port(text)


@pytest.fixture
def answering() -> Iterator[Any]:
    """Gives a function that has a port answer with bytes and hang up."""
    sockets: list[socket.socket] = []

    def listen(told: bytes) -> int:
        server = socket.create_server(("127.0.0.1", 0))
        sockets.append(server)

        def answer() -> None:
            connection, _ = server.accept()
            with connection:
                connection.sendall(told)

        threading.Thread(target=answer, daemon=True).start()
        port: int = server.getsockname()[1]
        return port

    yield listen
    for each in sockets:
        each.close()


def test_token_port() -> None:
    with link.TokenPort("127.0.0.1", 0, "tfb1:xyz") as port:
        host, number = link.split_host_port(port.address)
        assert {link.fetch_token(host, number) for _ in range(3)} == {"tfb1:xyz"}
        with pytest.raises(transferd.Unavailable, match=r"in use\): --listen"):
            link.TokenPort("127.0.0.1", number, "")
    with pytest.raises(transferd.Unavailable, match="nothing answers"):
        link.fetch_token(host, number)


@pytest.mark.parametrize(
    ("told", "error", "said"),
    [
        (b"", transferd.Unavailable, "is not `transferctl bench --serve`"),
        (b"SSH-2.0-OpenSSH_9.2\r\n", transferd.Unavailable, "is not `transferctl bench"),
        (b'{"bench": 1}\n', transferd.Unavailable, "is not `transferctl bench"),
        (b"[]\n", transferd.Unavailable, "is not `transferctl bench"),
        (b'{"bench": 2, "token": "tfb1:a"}\n', transferd.Conflict, "same transferd on both"),
    ],
)
def test_ports_of_others(
    answering: Any, told: bytes, error: type[transferd.TransferdError], said: str
) -> None:
    with pytest.raises(error, match=said):
        link.fetch_token("127.0.0.1", answering(told))


def test_a_port_behind_a_firewall(monkeypatch: pytest.MonkeyPatch) -> None:
    def drop(*_: object) -> None:
        raise TimeoutError("timed out")

    monkeypatch.setattr(socket, "create_connection", drop)
    with pytest.raises(transferd.Unavailable, match=r"nothing answers at a:1 \(timed out\)"):
        link.fetch_token("a", 1)


def test_names_that_nobody_knows() -> None:
    with pytest.raises(transferd.Unavailable, match=r"nothing answers at nobody.invalid:1 \([A-Z]"):
        link.fetch_token("nobody.invalid", 1)


def test_errors_travel() -> None:
    for error in (
        transferd.QuotaExceeded("full", reason="MEMLOCK"),
        errors.JobPeerLost("lost", job_id=1, status=2, detail="HEARTBEAT"),
        transferd.JobFailed("other", job_id=1, status=2, detail="CANCELLED"),
    ):
        with pytest.raises(transferd.TransferdError, match=f"target: {error}") as caught:
            link.checked(json.loads(json.dumps(link.failed(error))), "target")
        assert caught.value.reason == error.reason
        if type(error) is not transferd.JobFailed:
            assert isinstance(error, type(caught.value))


@pytest.mark.parametrize(
    "message",
    [
        "",
        "[]",
        "{}",
        '{"do": "format", "guest": "a", "number": 1}',
        '{"do": "close", "guest": "a", "number": -1}',
        '{"do": "close", "guest": "a", "number": 1, "also": 2}',
        '{"do": "close", "guest": "", "number": 1}',
        '{"do": "sessions", "guest": "a", "number": 1, "scheme": "pairs", "initiators": 65}',
        '{"do": "sessions", "guest": "a", "number": 1, "scheme": "ring", "initiators": 1}',
        '{"do": "open", "guest": "a", "number": 1, "step": 0, "operation": "write", "length": 0,'
        ' "seed": 1}',
        '{"do": "done", "guest": "a", "number": 1, "step": "s", "gbit_per_s": NaN,'
        ' "operations_per_s": 1.0}',
        '{"do": "places", "guest": "a", "number": 1, "first": "0"}',
        '{"do": "verify", "guest": "a", "number": 1, "lengths": [-1], "counts": [1]}',
        '{"do": "hello", "guest": "a", "number": 1, "protocol": 1, "version": "", "host": ""}',
    ],
)
def test_messages_that_do_not_fit_are_refused(message: str) -> None:
    with pytest.raises(pydantic.ValidationError):
        messages.parse(message)


# ---- the report and its picture ----


def machine(**changed: Any) -> Machine:
    daemon = Daemon(
        version="1",
        provider="libfabric tcp",
        peer_address="a:1",
        boot_epoch="00",
        tls=False,
        rails=[Rail(name=n, provider="tcp", speed_mbit_per_s=0) for n in ("eth0", "eth1")],
        warnings=["slow"],
    )
    values: dict[str, Any] = {
        "host": "a",
        "kernel": "6",
        "cpu": "x",
        "cpus": 2,
        "memory_bytes": 1,
        "python": "3",
        "transferd": "1",
        "daemon": daemon,
    }
    return Machine(**{**values, **changed})


def row(size: int, rate: float, operation: str = "write", **changed: Any) -> Row:
    times = spread([size * 1000, size * 3000])
    values: dict[str, Any] = {
        "operation": operation,
        "size_bytes": size,
        "batch": 1,
        "scheme": PAIRS,
        "initiators": 1,
        "in_flight": 8,
        "slots": 8,
        "shape": "",
        "shape_pages": 0,
        "batches": 10,
        "seconds": 1.0,
        "gbit_per_s": rate,
        "gbyte_per_s": rate / 8,
        "operations_per_s": 10.0,
        "hosts": 1,
        "all_gbit_per_s": rate,
        "all_operations_per_s": 10.0,
        "each_operations_per_s": [10.0],
        "jain": 1.0,
        "repeats_gbit_per_s": [rate],
        "latency_us": times,
        "prep_us": times,
        "post_us": times,
        "transfer_us": times,
        "register_ms": 1.0,
        "target_register_ms": 1.0,
        "open_ms": 1.0,
        "paths": [Path(provider="libfabric", rails=1, staged=False, packed=False)],
        "batches_in_all": 20,
        "compared_bytes": size,
    }
    return Row(**{**values, **changed})


def report(rows: list[Row]) -> Report:
    return Report(
        schema_version=SCHEMA,
        started="now",
        parameters={},
        initiator=machine(),
        target=machine(host="b"),
        complete=True,
        error="",
        notes=[],
        rows=rows,
    )


def test_picture() -> None:
    rows = [
        row(8192, 20.0),
        row(4096, 10.0),
        row(4096, 5.0, "read"),
        row(4096, 7.0, scheme=MANY_TO_ONE, initiators=3, batch=2),
        row(0, 0.0, "imm"),
    ]
    figure = plot.draw(report(rows))
    rate, latency = figure.axes
    lines = {line.get_label(): line for line in rate.lines}
    assert list(lines) == ["write", "read", "write, batch 2, 3 to 1"]
    assert np.asarray(lines["write"].get_xdata()).tolist() == [4096, 8192]
    assert np.asarray(lines["write"].get_ydata()).tolist() == [10.0, 20.0]
    times = {line.get_label(): line for line in latency.lines}
    assert list(times)[:2] == ["write, p50", "write, p99"]
    assert np.asarray(times["write, p50"].get_ydata()).tolist() == [
        r.latency_us.p50 for r in (rows[1], rows[0])
    ]
    assert np.asarray(times["read, p99"].get_ydata()).tolist() == [rows[2].latency_us.p99]


def test_picture_of_nothing() -> None:
    assert len(plot.draw(report([])).axes) == 2


def test_paths_that_nobody_expected_are_said() -> None:
    here = machine()
    there = machine(host="b")
    (rails, warning) = path_notes([row(1, 1.0)], here, there, meant=False)
    assert "1 of the 2 rails" in rails
    assert warning == "daemon of this host, b: slow"
    local = Path(provider="local", rails=1, staged=False, packed=False)
    notes = path_notes([row(1, 1.0, paths=[local])], here, there, meant=False)
    assert "no NIC was measured" in notes[0]
    assert path_notes([row(1, 1.0, paths=[local])], here, there, meant=True) == [warning]
    other = Path(provider="sim", rails=2, staged=False, packed=False)
    notes = path_notes([row(1, 1.0, paths=[other])], here, there, meant=False)
    assert "jobs went by sim, and this daemon's provider is libfabric" in notes[0]
    staged = Path(provider="libfabric", rails=2, staged=True, packed=False)
    mixed = path_notes([row(1, 1.0), row(2, 1.0, paths=[staged])], here, there, meant=False)
    assert any("staged" in note for note in mixed)
    emulated = staged.model_copy(update={"staged": False, "emulated": True})
    assert str(emulated) == "libfabric, 2 rails, emulated"
    told = path_notes([row(1, 1.0, paths=[emulated])], here, there, meant=False)
    assert any("no RDMA write" in note for note in told)
    assert not any("several ways" in note for note in mixed)  # each size its own: as it is meant
    notes = path_notes([row(1, 1.0, paths=[local, staged])], here, there, meant=True)
    assert "jobs of one size went several ways: local, 1 rail; libfabric, 2 rails, staged" in notes
