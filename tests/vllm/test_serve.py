# SPDX-License-Identifier: Apache-2.0
"""The command lines of client/kv/README.md, and requests over HTTP as vLLM's proxies make them."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import signal
import subprocess
import sys
import urllib.request
from typing import TYPE_CHECKING, Any

import pytest

from transferd.client.demo.daemons import free_port

from support import tree
from support.engines import ARGUMENTS, ENVIRONMENT, PREFILL, START_S, prompt
from support.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from conftest import MakeDaemon

SERVER = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
OPTIONS = ("max_model_len", "dtype", "block_size", "num_gpu_blocks_override")


def documented() -> list[dict[str, Any]]:
    """Reads the connectors' configurations of the two command lines."""
    text = (tree.ROOT / "client" / "kv" / "README.md").read_text()
    found = re.findall(r"vllm serve MODEL .*? --kv-transfer-config '(\{.*?\}\})'", text, re.DOTALL)
    return [json.loads(one) for one in found]


@contextlib.contextmanager
def serving(folder: Path, name: str, connector: dict[str, Any]) -> Iterator[str]:
    """Runs a server; gives its URL."""
    port = free_port()
    command = [*SERVER, "--model", ARGUMENTS["model"], "--port", str(port), "--host", "127.0.0.1"]
    command += ["--kv-transfer-config", json.dumps(connector), "--skip-tokenizer-init"]
    command += ["--enforce-eager", "--no-enable-prefix-caching"]
    for option in OPTIONS:
        command += [f"--{option.replace('_', '-')}", str(ARGUMENTS[option])]
    with (folder / f"{name}.log").open("wb") as log:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            cwd=folder,
            env={**os.environ, **ENVIRONMENT, "PYTHONSAFEPATH": "1"},
        )
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def is_up(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=5) as answer:
            return bool(answer.status == 200)
    except (OSError, http.client.HTTPException):  # not yet, or it has not answered in time
        return False


def complete(url: str, asked: list[int], tokens: int, kv: dict[str, Any] | None) -> dict[str, Any]:
    """Asks for a completion of tokens, greedily."""
    body = {
        "model": ARGUMENTS["model"],
        "prompt": asked,
        "max_tokens": tokens,
        "temperature": 0,
        "ignore_eos": True,
        "return_token_ids": True,
        **({"kv_transfer_params": kv} if kv else {}),
    }
    request = urllib.request.Request(
        f"{url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        found: dict[str, Any] = json.load(answer)
    return found


def metric(url: str, name: str) -> float:
    """Sums a metric over its labels."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=10) as answer:
        lines = answer.read().decode().splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith(f"{name}{{"))


def test_the_documented_command_lines(tiny: Path, make_daemon: MakeDaemon, short_tmp: Path) -> None:
    first, second = documented()
    for one in (first, second):
        one["kv_connector_extra_config"]["socket"] = make_daemon().socket
    logs = [short_tmp / "prefill.log", short_tmp / "decode.log"]
    with serving(short_tmp, "prefill", first) as prefill, serving(short_tmp, "decode", second) as d:
        for url, log in ((prefill, logs[0]), (d, logs[1])):
            try:
                eventually(lambda url=url: is_up(url), f"{url} is up", START_S)  # type: ignore[misc]
            except AssertionError:
                pytest.fail(log.read_text()[-6000:])
        asked = prompt(300)
        alone = complete(d, asked, 6, None)["choices"][0]["token_ids"]
        handed = complete(prefill, asked, 1, PREFILL)
        there = complete(d, asked, 6, handed["kv_transfer_params"])
        assert there["choices"][0]["token_ids"] == alone
        eventually(
            lambda: metric(d, "vllm:transferd_received_tokens_total") == 300, "it was transferred"
        )
