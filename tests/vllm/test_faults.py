# SPDX-License-Identifier: Apache-2.0
"""TransferdConnector while engines and daemons die, and between engines that do not fit."""

from __future__ import annotations

import contextlib
import re
from typing import TYPE_CHECKING, Any

import pytest

from support.engines import (
    PREFILL,
    Engine,
    EngineError,
    all_given_back,
    prompt,
    remote_prefill,
    transferd_engine,
)
from support.waiting import eventually

if TYPE_CHECKING:
    from pathlib import Path

    from conftest import MakeDaemon

    from support.engines import MakeEngines

TOKENS = 6


def test_a_prefiller_and_the_daemons_are_killed(
    make_daemon: MakeDaemon, make_engines: MakeEngines, short_tmp: Path
) -> None:
    """What does not come is computed; a new prefiller, or new daemons, and it comes again."""
    near, far, file = make_daemon(), make_daemon(), short_tmp / "address"
    prefill, decode = make_engines(
        prefill=transferd_engine(near, "kv_producer", address_file=str(file)),
        decode=transferd_engine(far, "kv_consumer"),
    )
    address = file.read_text()
    asked = [prompt(600 + seed, seed) for seed in range(12)]
    alone = [decode.generate(one, TOKENS).tokens for one in asked]
    waiting = [
        decode.begin(one, TOKENS, remote_prefill(address, f"{i}")) for i, one in enumerate(asked)
    ]
    for i, one in enumerate(asked):
        prefill.begin(one, 1, {**PREFILL, "transfer_id": f"{i}"})
    assert decode.end(waiting[0]).tokens == alone[0]
    prefill.kill()
    for number, tokens in zip(waiting[1:], alone[1:], strict=True):
        assert decode.end(number).tokens == tokens
    all_given_back(decode)
    assert decode.metrics()["vllm:transferd_received_total"] == len(asked)
    lost = len(asked) - decode.metrics()["vllm:transferd_seconds_count"]
    assert lost > 0, "it was killed too late"

    file.unlink()
    (prefill,) = make_engines(again=transferd_engine(near, "kv_producer", address_file=str(file)))
    handed = prefill.generate(asked[0], 1, PREFILL)
    assert decode.generate(asked[0], TOKENS, handed.kv).tokens == alone[0]
    assert decode.metrics()["vllm:transferd_seconds_count"] == len(asked) - lost + 1

    handed = prefill.generate(asked[1], 1, PREFILL)
    near.kill()
    assert decode.generate(asked[1], TOKENS, handed.kv).tokens == alone[1]
    all_given_back(prefill)
    handed = prefill.generate(asked[1], 1, PREFILL)
    assert handed.tokens == alone[1][:1]
    all_given_back(prefill)
    far.kill()
    kv = handed.kv or remote_prefill(address, "nobody")
    assert decode.generate(asked[1], TOKENS, kv).tokens == alone[1]
    all_given_back(decode)
    came = len(asked) - lost + 1
    assert decode.metrics()["vllm:transferd_seconds_count"] == came

    stale = file.read_text()
    for daemon in (near, far):
        daemon.start()
    for engine in (prefill, decode):  # each comes back with a step
        eventually(
            lambda engine=engine: (  # type: ignore[misc]
                engine.generate(prompt(1), 1) and "with the daemon again" in engine.log()
            ),
            f"{engine.name} is back",
        )
    assert file.read_text() != stale
    number = decode.begin(asked[2], TOKENS, remote_prefill(file.read_text(), "again"))
    prefill.generate(asked[2], 1, {**PREFILL, "transfer_id": "again"})
    assert decode.end(number).tokens == alone[2]
    handed = prefill.generate(asked[3], 1, PREFILL)
    assert handed.kv is not None
    assert handed.kv["remote_address"] == file.read_text()
    assert decode.generate(asked[3], TOKENS, handed.kv).tokens == alone[3]
    assert decode.metrics()["vllm:transferd_seconds_count"] == came + 2
    for engine in (prefill, decode):
        all_given_back(engine)


def test_engines_that_do_not_fit(
    make_daemon: MakeDaemon, make_engines: MakeEngines, short_tmp: Path
) -> None:
    """Other weights, say: nothing is transferred. Options that are none: it does not even start."""
    daemon = make_daemon()
    with contextlib.ExitStack() as stack:
        wrong = Engine(short_tmp, "wrong", **transferd_engine(daemon, adress_file="x"))
        stack.callback(wrong.kill)
        wrong.spawn()
        prefill, decode = make_engines(
            prefill=transferd_engine(daemon, lease_s=5.0),
            decode=transferd_engine(daemon, model="another"),
        )
        with pytest.raises(EngineError):
            wrong.ready()
        assert re.search(r"'adress_file'; there are .*address_file", wrong.log())
    asked = prompt(300)
    alone = prefill.generate(asked, TOKENS).tokens
    handed = prefill.generate(asked, 1, PREFILL)
    assert decode.generate(asked, TOKENS, handed.kv).tokens == alone
    assert re.search(r"differ: model: .*another", decode.log())
    all_given_back(prefill)  # by its lease
    all_given_back(decode)
    metrics: dict[str, Any] = decode.metrics()
    assert metrics["vllm:transferd_received_total"] == 1
    assert metrics.get("vllm:transferd_received_tokens_total", 0) == 0
