# SPDX-License-Identifier: Apache-2.0
"""A decoder with a torch model on a GPU, in a process of its own; also that process.

    python -m bench.kv_gpu_decoder DEVICE SHAPE REQUESTS TOKENS

DEVICE is the number of a GPU, or "double"; SHAPE a LlamaShape as JSON.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
from typing import TYPE_CHECKING, Any

import pytest

import transferd
from bench.served import ServedProcess, serve

from support.fakecuda import installed
from support.kv_double import Double
from support.kv_graph import Cuda, Decodes
from support.kv_llama import LlamaShape

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transferd.kv import Transfer

    from support.kv_graph import Place


class DecoderProcess(ServedProcess):
    """The process as the benchmark sees it."""

    def __init__(self, device: str, shape: LlamaShape, requests: int, tokens: int) -> None:
        """Starts it, and waits until it is there."""
        sizes = json.dumps(dataclasses.asdict(shape))
        super().__init__("bench.kv_gpu_decoder", device, sizes, str(requests), str(tokens))


class _Served:
    """The commands; each is a method."""

    def __init__(self, side: Decodes) -> None:
        self._side = side
        self._open = contextlib.ExitStack()
        self._transfers: list[Transfer] = []

    def about(self) -> dict[str, Any]:
        return {"checksum": self._side.model.checksum()}

    def attach(self, socket: str, address: str) -> dict[str, Any]:
        """Makes a decoder at a daemon, and presents it to a prefiller."""
        layers, slots = self._side.shape.layers, 2 * self._side.requests
        counters = slots * (layers + 1) + 64
        client = self._open.enter_context(transferd.Client(socket, counters=counters))
        self._side.attach(client)
        self._open.callback(self._side.rank.close)
        self._side.rank.connect(bytes.fromhex(address), timeout_s=20)
        return {}

    def detach(self) -> dict[str, Any]:
        self._open.close()
        return {}

    def ask(self, ids: list[str], address: str) -> dict[str, Any]:
        self._transfers = self._side.ask(ids, bytes.fromhex(address))
        return {}

    def landed(self) -> dict[str, Any]:
        """Tells when the first layer of all was there, and when the last one."""
        ends = [self._side.landed(self._transfers, n) for n in (1, self._side.shape.layers)]
        return {"first": ends[0], "last": ends[1]}

    def tokens(self) -> dict[str, Any]:
        return {"tokens": self._side.first(self._transfers)}

    def digests(self) -> dict[str, Any]:
        return {"digests": self._side.digests()}

    def generate(self, first: list[int], count: int) -> dict[str, Any]:
        return {"tokens": self._side.generate(first, count)}


@contextlib.contextmanager
def place_of(device: str) -> Iterator[Place]:
    """Finds what computes."""
    if device == "double":
        with pytest.MonkeyPatch.context() as patch, installed(patch) as cuda:
            yield Double(cuda)
    else:
        yield Cuda(int(device))


def main() -> None:
    """Serves commands until stdin ends."""
    device, sizes, requests, tokens = sys.argv[1:]
    with place_of(device) as place:
        serve(_Served(Decodes(place, LlamaShape(**json.loads(sizes)), int(requests), int(tokens))))


if __name__ == "__main__":
    main()
