# SPDX-License-Identifier: Apache-2.0
"""``transferd demo kv`` as people run it, and what it leaves behind: nothing."""

from __future__ import annotations

import contextlib
import json
import re
import signal
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import psutil
import pytest

from support.waiting import eventually

pytestmark = [pytest.mark.slow, pytest.mark.timeout(200)]

RUN_S = 180
# A shell may have started us with Ctrl-C ignored.
PROGRAM = """
import runpy, signal
signal.signal(signal.SIGINT, signal.default_int_handler)
runpy.run_module("transferd.client.demo", run_name="__main__")
"""


def demo(*arguments: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-m", "transferd.client.demo", "kv", "--json", *arguments],
        capture_output=True,
        text=True,
        timeout=RUN_S,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    outcome: dict[str, Any] = json.loads(done.stdout)
    assert outcome["good"]
    assert outcome["wrong"] == []
    return outcome


@pytest.mark.long
def test_a_few_requests() -> None:
    outcome = demo("--requests", "6")
    assert outcome["requests"] == 6
    assert sum(outcome["prefillers"].values()) == sum(outcome["decoders"].values()) == 6
    assert [text.split()[0] for text in outcome["marks"]][1:] == ["p2", "p2"]


@pytest.mark.long
def test_all_requests_and_their_picture(tmp_path: Path) -> None:
    picture = tmp_path / "timeline.html"
    for _ in range(3):  # a busy machine may kill a prefiller only after it has finished
        outcome = demo("--timeline", str(picture))
        if outcome["failed"]:
            break
    assert outcome["requests"] == 24
    assert outcome["generated_tokens"] == 24 * 16
    assert outcome["reused_tokens"] > 0
    assert set(outcome["decoders"]) == {"d0", "d1"}
    assert outcome["prefillers"]["p2"] > 0
    killed = outcome["marks"][0].split()[0]
    assert outcome["failed"]
    assert {one["prefiller"] for one in outcome["failed"]} == {killed}
    page = picture.read_text()
    assert "http" not in page.replace("http://www.w3.org/2000/svg", "")
    found = re.search("<svg.*</svg>", page, re.DOTALL)
    assert found is not None
    titles = [title.text or "" for title in ET.fromstring(found[0]).iter() if "title" in title.tag]
    computed = {title for title in titles if "layer 7" in title}
    assert {title.split(":")[0] for title in computed} == {"p0", "p1", "p2"}
    landed = [title for title in titles if title.startswith("d") and "pages" in title]
    assert len(landed) > 24


def alive(pids: list[int]) -> list[int]:
    found = []
    for pid in pids:
        with contextlib.suppress(psutil.NoSuchProcess):
            if psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
                found.append(pid)
    return found


def command(process: psutil.Process) -> list[str]:
    """Tells its arguments; none: it has ended, as one that the demo itself has killed."""
    try:
        return list(process.cmdline())
    except psutil.NoSuchProcess:
        return []


@pytest.mark.long
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
@pytest.mark.parametrize("line", [1, 3], ids=["at its start", "after the kill"])
def test_nothing_is_left_behind(number: signal.Signals, line: int) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, "kv", "--requests", "100", "--json"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    with process:
        assert process.stderr is not None
        for _ in range(line):
            assert process.stderr.readline()
        children = psutil.Process(process.pid).children(recursive=True)
        (guard,) = (one for one in children if "transferd.client.demo.kvguard" in command(one))
        folder = Path(guard.cmdline()[-1])
        assert folder.is_dir()
        assert len(children) > 3
        pids = [child.pid for child in children]
        process.send_signal(number)
        process.stderr.read()
        assert process.wait(60) == (1 if number == signal.SIGINT else -number)
        if number == signal.SIGINT:  # it has waited for all
            assert not alive(pids)
            assert not folder.exists()
        eventually(lambda: not alive(pids), "all processes are gone", 40)
        eventually(lambda: not folder.exists(), "its folder is gone", 40)
