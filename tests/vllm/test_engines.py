# SPDX-License-Identifier: Apache-2.0
"""What the other tests of this folder stand on: an engine by itself, and vLLM's own connector."""

from __future__ import annotations

import os
import signal
from typing import TYPE_CHECKING, Any

import pytest

from transferd.client.demo.daemons import free_port

from support.engines import BLOCK_TOKENS, Engine, EngineError, prompt

if TYPE_CHECKING:
    from pathlib import Path

    from support.engines import MakeEngines


def test_an_engine_by_itself(make_engines: MakeEngines) -> None:
    """The reference of all that follows: greedy answers, told apart by any token; how it dies."""
    (engine,) = make_engines(one={})
    asked = [prompt(tokens, seed) for seed, tokens in enumerate((5, 100, 300))]
    first = [engine.generate(one, 12).tokens for one in asked]
    again = [engine.generate(one, 12).tokens for one in asked]
    assert first == again
    assert [len(tokens) for tokens in first] == [12, 12, 12]
    other = list(asked[2])
    other[10] += 1
    assert engine.generate(other, 12).tokens != first[2]  # the whole prompt matters

    assert engine._process is not None
    group = engine._process.pid
    number = engine.begin(prompt(200), 500)
    os.killpg(group, signal.SIGKILL)
    with pytest.raises(EngineError, match=f"answer request {number}"):
        engine.end(number)
    engine.kill()
    with pytest.raises(ProcessLookupError):  # all of its processes are gone
        os.killpg(group, 0)


def test_an_engine_that_cannot_start_says_why(tiny: Path, short_tmp: Path) -> None:
    engine = Engine(short_tmp, "wrong", arguments={"model": str(short_tmp / "no-such-model")})
    with pytest.raises(EngineError, match="no-such-model"), engine:
        pass


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="NIXL's packages are for x86_64")
def test_nixl_connector(make_engines: MakeEngines) -> None:
    """Prefill and decode over vLLM's own connector: what the benchmark compares ours with."""
    connector = {"kv_connector": "NixlConnector", "kv_role": "kv_both", "kv_buffer_device": "cpu"}

    def named() -> dict[str, Any]:
        port = str(free_port())
        return {"connector": connector, "environment": {"VLLM_NIXL_SIDE_CHANNEL_PORT": port}}

    prefill, decode = make_engines(prefill=named(), decode=named())
    asked = prompt(4 * BLOCK_TOKENS + 5)
    alone = decode.generate(asked, 8).tokens
    handed = prefill.generate(asked, 1, {"do_remote_decode": True, "do_remote_prefill": False})
    assert handed.kv, "the prefill says where its blocks are"
    there = decode.generate(asked, 8, handed.kv)
    assert there.tokens == alone
    assert decode.metrics()["vllm:nixl_xfer_time_seconds_count"] == 1
