# SPDX-License-Identifier: Apache-2.0
"""A model of which every other layer keeps a window: two groups of vLLM's, two block tables."""

from __future__ import annotations

from typing import TYPE_CHECKING

from support.engines import (
    CALM_S,
    HYBRID,
    PREFILL,
    all_given_back,
    prompt,
    remote_prefill,
    transferd_engine,
)

if TYPE_CHECKING:
    from pathlib import Path

    from conftest import MakeDaemon

    from support.engines import MakeEngines

TOKENS = 8
LENGTHS = (1, 31, 64, 65, 100, 300, 700)
CUT = (95, 127)  # the last token looks at a block that vLLM drops: the decoder computes these


def test_tokens_are_those_of_one_engine(
    make_daemon: MakeDaemon, make_engines: MakeEngines, short_tmp: Path
) -> None:
    near, far, file = make_daemon(), make_daemon(), short_tmp / "address"
    model = {"arguments": {"model": str(HYBRID)}}
    prefill, decode = make_engines(
        prefill={**transferd_engine(near, address_file=str(file), timeout_s=CALM_S), **model},
        decode={**transferd_engine(far, deadline_s=15.0, timeout_s=CALM_S), **model},
    )
    assert "disable_hybrid_kv_cache_manager=True" not in prefill.log()
    for seed, length in enumerate((*LENGTHS, *CUT)):
        asked = prompt(length, seed)
        alone = prefill.generate(asked, TOKENS).tokens
        handed = prefill.generate(asked, 1, PREFILL)
        assert decode.generate(asked, TOKENS, handed.kv).tokens == alone, f"{length} tokens"
        waiting = decode.begin(asked, TOKENS, remote_prefill(file.read_text(), f"{length}"))
        prefill.generate(asked, 1, {**PREFILL, "transfer_id": f"{length}"})
        assert decode.end(waiting).tokens == alone, f"{length} tokens"
    metrics = decode.metrics()
    assert metrics["vllm:transferd_received_tokens_total"] == 2 * sum(LENGTHS)
    assert metrics["vllm:transferd_seconds_count"] == 2 * len(LENGTHS)

    # Block numbers of two groups are not told apart, so the whole request is computed again.
    asked = prompt(200, 50)
    alone = prefill.generate(asked, TOKENS).tokens
    there = decode.generate(asked, TOKENS, remote_prefill(file.read_text(), "never"))
    assert there.tokens == alone
    all_given_back(decode)
