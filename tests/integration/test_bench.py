# SPDX-License-Identifier: Apache-2.0
"""transferctl bench between real daemons: figures, comparison, outputs, bad input."""

from __future__ import annotations

import base64
import json
import os
from typing import TYPE_CHECKING, Any

import pytest

import transferd
from transferd.client.ctl.bench import target as target_module
from transferd.client.ctl.bench.link import to_token
from transferd.client.ctl.bench.report import Report
from transferd.client.demo.daemons import free_port

from support.bench import END_S, bench, quiet, serving, start, target
from support.waiting import eventually

if TYPE_CHECKING:
    from pathlib import Path

    from conftest import MakeDaemon

    from support.daemon import DaemonProcess

    Pair = tuple[DaemonProcess, DaemonProcess]

pytestmark = pytest.mark.slow

SHORT = ("--iterations", "12", "--warm-up", "1", "--in-flight", "4")
PNG = b"\x89PNG\r\n\x1a\n"


def read(path: Path) -> Report:
    return Report.model_validate_json(path.read_text())


def test_every_operation_from_host_to_host(shared_pair: Pair, tmp_path: Path) -> None:
    near, far = shared_pair
    report, picture = tmp_path / "report.json", tmp_path / "picture.png"
    with serving(far, tmp_path / "far", "--once") as (process, where):
        told = bench(
            *("--to", where, "--socket", near.socket, *SHORT, "--expect", "tcp"),
            *("--op", "write,pages,read,scatter,imm", "--sizes", "1,3K-8K", "--batch", "1,5"),
            *("--json", str(report), "--plot", str(picture), "--repeat", "3"),
            log=tmp_path / "near",
        )
        assert process.wait(END_S) == 0
    found = read(report)
    assert (found.complete, found.error) == (True, "")
    expected = [
        (operation, batch, size)
        for operation in ("write", "pages", "read", "scatter", "imm")
        for batch in (1, 5)
        for size in ((0,) if operation == "imm" else (1, 3072, 6144, 8192))
    ]
    assert [(r.operation, r.batch, r.size_bytes) for r in found.rows] == expected
    for row in found.rows:
        assert row.compared_bytes == row.size_bytes * row.batch * 4
        assert (row.batches, row.batches_in_all) == (12, 1 + 12 + 3 * 12)
        assert len(row.repeats_gbit_per_s) == 3
        assert sorted(row.repeats_gbit_per_s)[1] == pytest.approx(row.gbit_per_s)
        assert row.operations_per_s == pytest.approx(12 * row.batch / row.seconds)
        assert row.gbit_per_s == pytest.approx(row.operations_per_s * row.size_bytes * 8e-9)
        for times in (row.latency_us, row.prep_us, row.post_us, row.transfer_us):
            assert times.count == 12
            assert 0 <= times.p50 <= times.p99 <= times.p999 <= times.max
        assert row.latency_us.mean == pytest.approx(row.post_us.mean + row.transfer_us.mean)
        assert {path.provider for path in row.paths} == {"tcp"}
    assert found.target is not None
    assert found.target.daemon is not None
    assert found.target.daemon.peer_address == far.peer_address
    assert picture.read_bytes().startswith(PNG)
    assert told.count("tcp, 1 rail") == len(expected)
    assert "has come" in (tmp_path / "far").read_text()
    quiet(near, far)


def test_many_to_one_and_pairs(shared_pair: Pair, tmp_path: Path) -> None:
    near, far = shared_pair
    report = tmp_path / "report.json"
    bench(
        *("--socket", near.socket, "--to", far.socket, "--sizes", "4K", *SHORT, "--checksum"),
        *("--pairs", "1,2", "--many-to-one", "3", "--json", str(report)),
        log=tmp_path / "log",
    )
    rows = read(report).rows
    assert [(row.scheme, row.initiators) for row in rows] == [
        ("pairs", 1),
        ("pairs", 2),
        ("many-to-one", 3),
    ]
    for row in rows:
        assert row.batches == 12 * row.initiators
        assert row.latency_us.count == 12 * row.initiators
        assert row.compared_bytes == 4 * 4096 * row.initiators
        assert len(row.each_operations_per_s) == row.initiators
        assert 1 / row.initiators <= row.jain <= 1 + 1e-9
        assert row.hosts == 1
    quiet(near, far)


def two_hosts(
    near: DaemonProcess, where: str, tmp_path: Path, *options: str
) -> list[tuple[int, str]]:
    """Runs two initiators, which the target takes for two hosts; gives how each ended."""
    both = ("--to", where, "--socket", near.socket)
    first = start(*both, *SHORT, "--sizes", "4K,8K", *options, log=tmp_path / "first")
    try:
        eventually(lambda: "has come" in (tmp_path / "far").read_text(), "the first is here")
        second = start(
            *(*both, *SHORT, "--sizes", "4K,8K", "--json", str(tmp_path / "report.json")),
            log=tmp_path / "second",
        )
        try:
            ends = [first.wait(END_S), second.wait(END_S)]
        finally:
            second.kill()
    finally:
        first.kill()
    logs = [(tmp_path / name).read_text() for name in ("first", "second")]
    return list(zip(ends, logs, strict=True))


def test_two_hosts_to_one_begin_together(shared_pair: Pair, tmp_path: Path) -> None:
    near, far = shared_pair
    with serving(far, tmp_path / "far", "--initiators", "2", "--once") as (process, where):
        ends = two_hosts(near, where, tmp_path)
        assert process.wait(END_S) == 0
    assert [status for status, _ in ends] == [0, 0]
    assert all("ALL HOSTS" in told for _, told in ends)
    told = (tmp_path / "far").read_text()
    for row, size in zip(read(tmp_path / "report.json").rows, ("4 KiB", "8 KiB"), strict=True):
        assert row.hosts == 2
        assert row.all_gbit_per_s > row.gbit_per_s
        assert f"= {row.all_gbit_per_s:,.2f} Gbit/s" in told
        assert f"write of {size}: " in told
    quiet(near, far)


def test_two_hosts_that_do_not_do_the_same(shared_pair: Pair, tmp_path: Path) -> None:
    near, far = shared_pair
    with serving(far, tmp_path / "far", "--initiators", "2") as (_, where):
        ends = two_hosts(near, where, tmp_path, "--op", "read")
    assert [status for status, _ in ends] == [1, 1]
    for _, told in ends:
        assert "do not do the same: ready read of 4 KiB; ready write of 4 KiB" in told
    quiet(near, far)


def test_loopback_json_to_stdout(daemon: DaemonProcess, tmp_path: Path) -> None:
    told = bench(
        *("--loopback", "--socket", daemon.socket, "--sizes", "64", *SHORT, "--json", "-"),
        log=tmp_path / "log",
    )
    found = json.loads(told[told.index("{\n") :])
    assert [path["provider"] for path in found["rows"][0]["paths"]] == ["local"]
    assert not any("no NIC" in note for note in found["notes"])
    quiet(daemon)


def test_without_shared_memory(make_daemon: MakeDaemon, tmp_path: Path) -> None:
    at = f"127.0.0.1:{free_port()}"
    tenant = {"name": "default", "lease_sessions": True, "shm_paths": True, "uids": [os.getuid()]}
    daemon = make_daemon(listen_tcp=at, tenants=[tenant])
    told = bench(
        *("--loopback", "--socket", at, "--sizes", "4K", "--op", "write,read", *SHORT),
        log=tmp_path / "log",
    )
    assert "jobs were submitted by gRPC" in told
    assert told.count("local, 1 rail") == 2
    quiet(daemon)


def test_shapes_are_scaled_to_the_memory(shared_pair: Pair, tmp_path: Path) -> None:
    near, far = shared_pair
    report = tmp_path / "report.json"
    told = bench(
        *("--socket", near.socket, "--to", far.socket, "--iterations", "2", "--memory", "16M"),
        *("--shape", "deepseek-r1-block,llama-3.1-70b-tp8", "--json", str(report)),
        log=tmp_path / "log",
    )
    block, llama = read(report).rows
    assert (block.shape, block.batch, block.shape_pages) == ("deepseek-r1-block", 28, 5958)
    assert (llama.batch, llama.size_bytes, llama.operation) == (2048, 8192, "pages")
    assert "28 of its 5,958 pages" in told
    assert "scale 1:212.8" in told


# ---- what is wrong is found ----


def corrupted(monkeypatch: pytest.MonkeyPatch, call: str, initiator: int, at: int) -> None:
    """Has a byte of the target's memory changed before a call."""
    whole = getattr(target_module.Guest, call)

    def wrong(guest: target_module.Guest, asked: Any) -> Any:
        guest.part(initiator)[at] ^= 0xFF
        return whole(guest, asked)

    monkeypatch.setattr(target_module.Guest, call, wrong)


@pytest.mark.parametrize(
    ("options", "call", "said"),
    [
        (["--op", "write"], "verify", "byte 8,203 of initiator 0 in the target's memory"),
        (["--op", "pages", "--batch", "4"], "verify", "(operation 2 of batch 0)"),
        (["--op", "read"], "places", "byte 8,203 of initiator 0 in what was read"),
        (["--many-to-one", "2"], "verify", "byte 8,203 of initiator 1 in the target's memory"),
        (["--pairs", "2"], "verify", "byte 8,203 of initiator 1 in the target's memory"),
    ],
)
def test_a_wrong_byte_is_found(
    shared_pair: Pair,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: list[str],
    call: str,
    said: str,
) -> None:
    near, far = shared_pair
    corrupted(monkeypatch, call, int(options[-1] == "2"), 8203)
    report = tmp_path / "report.json"
    with target(far) as made:
        told = bench(
            *("--to", to_token(made.descriptor), "--socket", near.socket, "--sizes", "4K"),
            *(*SHORT, *options, "--json", str(report)),
            log=tmp_path / "log",
            status=1,
        )
    assert "WRONG DATA" in told
    assert said in told
    found = read(report)
    assert not found.complete
    assert said in found.error
    quiet(near, far)


def test_a_wrong_count_is_found(
    shared_pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    near, far = shared_pair
    whole = target_module.Guest.open

    def wrong(guest: target_module.Guest, asked: Any, memory: int) -> Any:
        answer = whole(guest, asked, memory)
        guest.before[0] -= 1
        return answer

    monkeypatch.setattr(target_module.Guest, "open", wrong)
    with target(far) as made:
        told = bench(
            *("--to", to_token(made.descriptor), "--socket", near.socket, "--sizes", "4K", *SHORT),
            log=tmp_path / "log",
            status=1,
        )
    assert "26 operations of initiator 0 were counted, 25 were sent" in told


def test_a_path_that_was_not_expected(daemon: DaemonProcess, tmp_path: Path) -> None:
    told = bench(
        *("--loopback", "--socket", daemon.socket, "--sizes", "4K", *SHORT, "--expect", "verbs"),
        log=tmp_path / "log",
        status=1,
    )
    assert "--expect verbs: jobs went by local" in told
    assert "4 KiB" in told  # the table is there all the same


def test_one_daemon_where_two_were_meant(daemon: DaemonProcess, tmp_path: Path) -> None:
    with target(daemon) as made:
        told = bench(
            *("--to", to_token(made.descriptor), "--socket", daemon.socket, "--sizes", "4K"),
            *SHORT,
            log=tmp_path / "log",
        )
    assert "no NIC was measured" in told


# ---- limits ----


def test_the_sweep_is_cut_to_the_targets_memory(shared_pair: Pair, tmp_path: Path) -> None:
    near, far = shared_pair
    report = tmp_path / "report.json"
    with target(far, memory=64 << 10) as made:
        told = bench(
            *("--to", to_token(made.descriptor), "--socket", near.socket, "--sizes", "4K-64K"),
            *(*SHORT, "--json", str(report)),
            log=tmp_path / "log",
        )
    assert [row.size_bytes for row in read(report).rows] == [4096, 8192, 16384]
    assert "128 KiB are more than its 64 KiB: --memory of `transferctl bench --serve`" in told
    quiet(near, far)


def test_the_sweep_is_cut_to_a_quota(make_daemon: MakeDaemon, tmp_path: Path) -> None:
    far = make_daemon(tenants=[{"name": "default", "quotas": {"registered_bytes": "1MiB"}}])
    near = make_daemon()
    with target(far) as made:
        token = to_token(made.descriptor)
        options = ("--to", token, "--socket", near.socket, *SHORT)
        told = bench(*options, "--sizes", "64K,1M", log=tmp_path / "log")
        assert "left out from 4 MiB" in told
        assert "registered_bytes" in told
        nothing = bench(*options, "--sizes", "1M", log=tmp_path / "log", status=1)
        assert "nothing was measured: left out from 4 MiB" in nothing
    quiet(near, far)


# ---- bad input ----


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--to", "tfb1:?"], "not copied whole"),
        (["--to", "tfb1:AAAA"], "not a descriptor"),
        (["--to", "127.0.0.1:1"], "nothing answers at 127.0.0.1:1"),
        (["--to", "/nowhere/x.sock"], "target: no daemon answers at /nowhere/x.sock"),
        (["--loopback", "--memory", "4K", "--sizes", "1M"], "nothing was measured: left out"),
        (["--loopback", "--json", "/nowhere/x.json"], "/nowhere/x.json cannot be written"),
    ],
)
def test_errors_are_one_sentence(
    shared_pair: Pair, tmp_path: Path, arguments: list[str], said: str
) -> None:
    told = bench(*arguments, "--socket", shared_pair[0].socket, log=tmp_path / "log", status=1)
    assert said in told
    assert len(told.strip().splitlines()) == 1


def test_no_daemon(tmp_path: Path) -> None:
    for end in ("--serve", "--loopback"):
        told = bench(end, "--socket", "/nowhere/x.sock", log=tmp_path / "log", status=1)
        assert "transferd serve" in told


def test_no_matplotlib(shared_pair: Pair, tmp_path: Path) -> None:
    (tmp_path / "matplotlib.py").write_text("raise ImportError('not here')\n")
    told = bench(
        *("--loopback", "--socket", shared_pair[0].socket, "--plot", str(tmp_path / "x.png")),
        log=tmp_path / "log",
        status=1,
        environment={"PYTHONPATH": str(tmp_path)},
    )
    assert "pip install 'transferd[bench]'" in told
    assert not (tmp_path / "x.png").exists()


def test_a_target_outlives_what_others_send_it(shared_pair: Pair, tmp_path: Path) -> None:
    near, far = shared_pair
    hello = {"do": "hello", "guest": "x", "number": 1, "version": "9", "host": "h"}
    with target(far) as made, transferd.Client(near.socket) as hostile:
        mailbox = hostile.mailbox(64, 8192)

        def say(**values: Any) -> None:
            hostile.send(made.descriptor, json.dumps(values).encode()).wait(10)

        def heard() -> dict[str, Any]:
            answer: dict[str, Any] = json.loads(mailbox.receive(10))
            return answer if answer["number"] else heard()

        hostile.send(made.descriptor, b"\xff\x00 no JSON").wait(10)
        hostile.send(made.descriptor, b"[" * 8192).wait(10)
        say(**hello, protocol=1, reply_to="AAAA")  # no descriptor
        reply_to = to_base64(mailbox.descriptor)
        say(**hello, protocol=7, reply_to=reply_to, new="field")
        assert "speaks version 7" in heard()["failed"]
        say(**hello, protocol=1, reply_to=reply_to)
        assert heard()["machine"]["host"]
        say(do="verify", guest="x", number=2, lengths=[1], counts=[1])
        assert heard()["number"] == 2
        say(do="open", guest="x", number=3, step=0, operation="write", length=1 << 41, seed=1)
        assert "open" in heard()["failed"]
        say(do="sessions", guest="x", number=4, scheme="pairs", initiators=1)
        assert heard() == {"number": 4}
        say(do="open", guest="x", number=5, step=0, operation="write", length=4096, seed=1)
        assert "register_ms" in heard()
        say(do="verify", guest="x", number=6, lengths=[1], counts=[1, 2])
        assert "1 each" in heard()["failed"]
        mailbox.close()
        bench(
            *("--to", to_token(made.descriptor), "--socket", near.socket, "--sizes", "4K", *SHORT),
            log=tmp_path / "log",
        )
    quiet(near, far)


def to_base64(data: bytes) -> str:
    return base64.b64encode(data).decode()
