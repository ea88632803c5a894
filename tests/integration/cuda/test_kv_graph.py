# SPDX-License-Identifier: Apache-2.0
"""What runs captured graphs on a GPU (tests/gpu, tests/bench/kv_gpu.py), without one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from support.daemon import DaemonProcess
    from support.fakecuda import FakeCuda

pytestmark = [pytest.mark.slow, pytest.mark.timeout(120)]

graph: Any = pytest.importorskip("support.kv_graph", reason="torch is not installed")
double: Any = pytest.importorskip("support.kv_double")
bench: Any = pytest.importorskip("bench.kv_gpu")
REQUESTS, TOKENS = 2, 32


def test_rounds_of_the_benchmark(
    cuda: FakeCuda, shared_pair: tuple[DaemonProcess, DaemonProcess]
) -> None:
    from bench.kv_gpu_decoder import DecoderProcess

    from support.kv_llama import LlamaShape

    one = shared_pair[0]
    shape = LlamaShape(
        layers=3,
        hidden=64,
        heads=4,
        kv_heads=2,
        head_dim=16,
        mlp=96,
        vocabulary=64,
        dtype="float32",
        pages=64,
        page_tokens=16,
    )
    side = graph.Prefills(double.Double(cuda), shape, REQUESTS, TOKENS)
    with DecoderProcess("double", shape, REQUESTS, TOKENS) as there:
        assert there.about["checksum"] == side.model.checksum()
        with bench.paths() as seen, bench.way(side, there, one, one) as way:
            for _ in range(3):
                way.round(check=True)
    assert way.found.equal == way.found.checked == 3 * REQUESTS
    assert len(way.found.plain) == len(way.found.late) == 3
    assert seen["cuda, 1 rail"] == 3 * REQUESTS * shape.layers
