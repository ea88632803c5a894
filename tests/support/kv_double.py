# SPDX-License-Identifier: Apache-2.0
"""A place for :mod:`support.kv_graph` that is no GPU: the CUDA driver of host memory."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import torch

from support.fakecuda import DeviceBuffer, FakeCuda
from support.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import Callable


class Double:
    """Computes at once, on the CPU; counts are enqueued on a stream of the driver."""

    def __init__(self, cuda: FakeCuda) -> None:
        self.device = torch.device("cpu")
        self._cuda = cuda
        self.stream = cuda.stream()

    def memory(self, shape: tuple[int, ...], dtype: Any) -> tuple[Any, Any]:
        length = torch.Size(shape).numel() * dtype.itemsize
        buffer = DeviceBuffer(self._cuda, self._cuda.malloc(length, 0), length)
        made = torch.frombuffer(buffer.view, dtype=dtype).reshape(shape)
        return made, buffer

    def capture(self, call: Callable[[], None]) -> Callable[[], None]:
        return call

    def timed(
        self, before: Callable[[], None], measured: Callable[[], None]
    ) -> tuple[float, float]:
        before()
        begin = time.monotonic()
        measured()
        end = time.monotonic()
        return end - begin, end

    def settle(self) -> None:
        eventually(lambda: self._cuda.done(self.stream), "the stream is through")
