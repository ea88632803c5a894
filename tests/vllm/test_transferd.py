# SPDX-License-Identifier: Apache-2.0
"""TransferdConnector in real engines that live: a prefiller and a decoder, each with its daemon."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

from support.engines import BLOCK_TOKENS, PREFILL, all_given_back, prompt, remote_prefill
from support.waiting import eventually

if TYPE_CHECKING:
    from support.engines import Pair

TOKENS = 8
LONG = 7000  # tokens: 28 steps of the engine
LEASE_S = 30  # of both engines
LENGTHS = (1, BLOCK_TOKENS - 1, BLOCK_TOKENS, BLOCK_TOKENS + 1, 100, 255, 256, 257, 700)


def remote(pair: Pair, transfer_id: str) -> dict[str, Any]:
    """Makes what a decoder is told that is asked before the prefiller has answered."""
    return remote_prefill(pair.address, transfer_id)


def count(pair: Pair, name: str) -> float:
    """Reads a counter of the decoder."""
    return pair.decode.metrics().get(name, 0.0)


def test_tokens_are_those_of_one_engine(pair: Pair) -> None:
    """Prompts shorter than a block, of whole blocks, in one chunk and in several."""
    for seed, length in enumerate(LENGTHS):
        asked = prompt(length, seed)
        alone = pair.alone(asked, TOKENS)
        handed = pair.prefill.generate(asked, 1, PREFILL)
        assert handed.kv is not None
        assert handed.tokens == alone[:1]
        there = pair.decode.generate(asked, TOKENS, handed.kv)
        assert there.tokens == alone, f"{length} tokens"
    metrics = pair.decode.metrics()
    assert metrics["vllm:transferd_received_tokens_total"] == sum(LENGTHS)
    assert metrics["vllm:transferd_received_bytes_total"] == sum(LENGTHS) * 4 * 2 * 2 * 32 * 4
    assert metrics["vllm:transferd_seconds_count"] == len(LENGTHS)
    eventually(
        lambda: pair.prefill.metrics().get("vllm:transferd_sent_total") == len(LENGTHS),
        "the prefiller has counted them all",
    )
    all_given_back(pair.prefill, pair.decode)


def test_the_decoder_is_asked_first(pair: Pair) -> None:
    """It asks a prefiller that does not know of the request yet, and that computes it in chunks."""
    asked = prompt(700, 50)
    alone = pair.alone(asked, TOKENS)
    before = count(pair, "vllm:transferd_received_tokens_total")
    waiting = pair.decode.begin(asked, TOKENS, remote(pair, "first"))
    other = pair.decode.generate(prompt(40, 51), 4)  # the engine goes on with others meanwhile
    assert len(other.tokens) == 4
    pair.prefill.generate(asked, 1, {**PREFILL, "transfer_id": "first"})
    assert pair.decode.end(waiting).tokens == alone
    assert count(pair, "vllm:transferd_received_tokens_total") == before + 700
    all_given_back(pair.prefill, pair.decode)


def test_many_at_once(pair: Pair) -> None:
    """Prefill and decode side by side, in an order of their own each."""
    mixed = random.Random(8)
    asked = [prompt(mixed.randint(1, 600), 100 + seed) for seed in range(24)]
    alone = [pair.alone(one, TOKENS) for one in asked]
    before = count(pair, "vllm:transferd_received_tokens_total")
    order = list(range(len(asked)))
    mixed.shuffle(order)
    waiting = {i: pair.decode.begin(asked[i], TOKENS, remote(pair, f"many {i}")) for i in order}
    mixed.shuffle(order)
    prefills = [
        pair.prefill.begin(asked[i], 1, {**PREFILL, "transfer_id": f"many {i}"}) for i in order
    ]
    for number in prefills:
        pair.prefill.end(number)
    for i, number in waiting.items():
        assert pair.decode.end(number).tokens == alone[i], i
    assert count(pair, "vllm:transferd_received_tokens_total") == before + sum(map(len, asked))
    all_given_back(pair.prefill, pair.decode)


def test_what_the_decoder_has_is_not_sent(pair: Pair) -> None:
    """A prefix of whole blocks in its own cache stays there."""
    asked = prompt(300, 70)
    longer = [*asked[:290], *prompt(100, 71)]
    alone = pair.alone(longer, TOKENS)
    for one in (asked, longer):
        before = count(pair, "vllm:transferd_received_tokens_total")
        handed = pair.prefill.generate(one, 1, PREFILL)
        there = pair.decode.generate(one, TOKENS, handed.kv)
    assert there.tokens == alone
    fresh = len(longer) - 290 // BLOCK_TOKENS * BLOCK_TOKENS
    assert count(pair, "vllm:transferd_received_tokens_total") == before + fresh


def test_aborted_at_the_decoder(pair: Pair) -> None:
    """While it waits: its blocks are back, and the next request gets them unharmed."""
    asked = prompt(500, 80)
    alone = pair.alone(asked, TOKENS)
    waiting = pair.decode.begin(asked, TOKENS, remote(pair, "aborted"))
    pair.decode.generate(prompt(10, 81), 1)  # it has been scheduled by now
    pair.decode.abort(waiting)
    assert pair.decode.end(waiting).reason == "abort"
    all_given_back(pair.prefill, pair.decode)
    handed = pair.prefill.generate(asked, 1, PREFILL)
    assert pair.decode.generate(asked, TOKENS, handed.kv).tokens == alone


def test_aborted_in_the_queue(pair: Pair) -> None:
    """The decoder has not asked yet: the prefiller's blocks are back before the lease is over."""
    asked = prompt(500, 85)
    handed = pair.prefill.generate(asked, 1, PREFILL)
    assert pair.prefill.metrics()["vllm:kv_cache_usage_perc"] > 0.0
    busy = [pair.decode.begin(prompt(LONG, seed), 1) for seed in (86, 87, 88)]  # all of each step
    waiting = pair.decode.begin(asked, 1000, handed.kv)
    for _ in range(5):  # one that comes before its request does nothing
        pair.decode.abort(waiting)
        pair.decode.metrics()
    assert pair.decode.end(waiting).reason == "abort"
    eventually(
        lambda: pair.prefill.metrics()["vllm:kv_cache_usage_perc"] == 0.0,
        "the prefiller has all of its blocks back",
        timeout_s=LEASE_S - 5,
    )
    for number in busy:
        pair.decode.end(number)
    all_given_back(pair.prefill, pair.decode)


def test_aborted_at_the_prefiller(pair: Pair) -> None:
    """In the middle of its chunks: the decoder computes the request itself."""
    asked = prompt(LONG, 90)
    alone = pair.alone(asked, TOKENS)
    before = count(pair, "vllm:transferd_received_tokens_total")
    waiting = pair.decode.begin(asked, TOKENS, remote(pair, "given up"))
    number = pair.prefill.begin(asked, 1, {**PREFILL, "transfer_id": "given up"})
    eventually(
        lambda: pair.prefill.metrics().get("vllm:num_requests_running"), "it is being computed"
    )
    pair.prefill.abort(number)
    assert pair.prefill.end(number).reason == "abort"
    assert pair.decode.end(waiting).tokens == alone
    assert count(pair, "vllm:transferd_received_tokens_total") == before
    all_given_back(pair.prefill, pair.decode)


def test_a_prefill_that_nobody_begins(pair: Pair) -> None:
    """The decoder's deadline passes, then it computes the request itself."""
    asked = prompt(200, 95)
    alone = pair.alone(asked, TOKENS)
    there = pair.decode.generate(asked, TOKENS, remote(pair, "never"))
    assert there.tokens == alone
    all_given_back(pair.prefill, pair.decode)


def test_nonsense_is_computed_here(pair: Pair) -> None:
    asked = prompt(200, 96)
    alone = pair.alone(asked, TOKENS)
    for values in ({"remote_address": "?"}, {"remote_address": "AAAA"}, {"transfer_id": 5}):
        kv = {**remote(pair, "nonsense"), **values}
        assert pair.decode.generate(asked, TOKENS, kv).tokens == alone
    all_given_back(pair.prefill, pair.decode)
