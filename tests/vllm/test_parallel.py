# SPDX-License-Identifier: Apache-2.0
"""Engines of different tensor parallel sizes: heads of one rank come from two, and go to two."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from support.engines import (
    CALM_S,
    PREFILL,
    all_given_back,
    prompt,
    remote_prefill,
    transferd_engine,
)

if TYPE_CHECKING:
    from conftest import MakeDaemon

    from support.engines import MakeEngines

CALM = Path(__file__).parent / "calm"
TOKENS = 6
LENGTHS = (20, 300)


def test_one_rank_and_two(
    make_daemon: MakeDaemon, make_engines: MakeEngines, short_tmp: Path
) -> None:
    near, far = make_daemon(), make_daemon()
    files = [short_tmp / "one.address", short_tmp / "two.address"]

    def arguments(daemon: Any, file: Path, ranks: int) -> dict[str, Any]:
        made = transferd_engine(daemon, address_file=str(file), timeout_s=CALM_S)
        return {
            **made,
            "arguments": {"tensor_parallel_size": ranks},
            "environment": {"PYTHONPATH": str(CALM)},
        }

    one, two = make_engines(one=arguments(near, files[0], 1), two=arguments(far, files[1], 2))
    for turn, (prefill, decode, file) in enumerate(((one, two, files[0]), (two, one, files[1]))):
        for seed, length in enumerate(LENGTHS):
            asked = prompt(length, 10 * turn + seed)
            alone = decode.generate(asked, TOKENS).tokens
            handed = prefill.generate(asked, 1, PREFILL)
            assert decode.generate(asked, TOKENS, handed.kv).tokens == alone
            name = f"{prefill.name} {length}"
            waiting = decode.begin(asked, TOKENS, remote_prefill(file.read_text(), name))
            prefill.generate(asked, 1, {**PREFILL, "transfer_id": name})
            assert decode.end(waiting).tokens == alone
        ranks = 2 if decode is two else 1
        assert decode.metrics()["vllm:transferd_seconds_count"] == 2 * len(LENGTHS) * ranks
    all_given_back(one, two)
