# SPDX-License-Identifier: Apache-2.0
"""The benchmarks of transferd.kv in small: a decoder here, a prefiller in another process."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from bench import kv_aborts, kv_answers
from bench.kv_caches import CacheShape
from bench.kv_killed import Round
from bench.kv_pair import decoder
from bench.kv_prefiller import PrefillerProcess
from bench.kv_rates import Requests

from transferd.client.ctl.bench.shapes import Shape

if TYPE_CHECKING:
    from support.daemon import DaemonProcess

    Pair = tuple[DaemonProcess, DaemonProcess]

pytestmark = [pytest.mark.slow, pytest.mark.timeout(120)]


def test_aborts_of_one_of_many_wait_for_no_other(shared_pair: Pair) -> None:
    near, far = shared_pair
    took: dict[str, list[float]] = {"the decoder": [], "the prefiller": []}
    with (
        PrefillerProcess(near.socket, kv_answers.SHAPE) as there,
        decoder(far.socket, kv_answers.SHAPE, stages=8, slots=64) as here,
    ):
        here.rank.connect(there.address, timeout_s=20)
        right = kv_answers.one_round(here, there, 0, took)
    assert right == kv_answers.REQUESTS - kv_answers.ABORTED
    assert [len(times) for times in took.values()] == [kv_answers.ABORTED // 2] * 2


def test_aborts_in_mid_transfer(shared_pair: Pair) -> None:
    near, far = shared_pair
    with (
        PrefillerProcess(near.socket, kv_aborts.SHAPE) as there,
        decoder(far.socket, kv_aborts.SHAPE, stages=8, slots=8) as here,
    ):
        here.rank.connect(there.address, timeout_s=20)
        good, met, made = kv_aborts.abort_many(here, there, 4)
    assert good == met <= made


def test_a_killed_prefiller_is_replaced(shared_pair: Pair) -> None:
    near, far = shared_pair
    shape = CacheShape(layers=16, page_tokens=16, item_bytes=64, pages=1024)
    with (
        PrefillerProcess(near.socket, shape) as victim,
        PrefillerProcess(near.socket, shape) as other,
        decoder(far.socket, shape, stages=8, slots=16) as here,
    ):
        one = Round(here, victim, other, 0)
        ends = one.run(0.0)
        assert one.right
        assert len(ends) == one.met >= 2  # at least those that were not computed
        assert len(here.cache.free) == shape.pages


def test_parts_of_a_transfer_are_told(shared_pair: Pair) -> None:
    near, far = shared_pair
    pages = Shape("tiny", "", layers=4, token_bytes=64, page_tokens=8, input_tokens=100)
    shape = CacheShape(layers=4, page_tokens=8, item_bytes=64, pages=2 * 13)
    with (
        PrefillerProcess(near.socket, shape) as there,
        decoder(far.socket, shape, slots=8) as here,
    ):
        requests = Requests(here, there, pages, 2)
        try:
            took = requests.seconds()
        finally:
            requests.close()
    (parts,) = requests.parts
    assert parts["all"] == took > 0
    assert parts["prep"] > 0
    assert parts["post"] > 0
