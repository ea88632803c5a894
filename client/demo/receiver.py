# SPDX-License-Identifier: Apache-2.0
"""The demo's receiving process: it waits on counters only, then looks at what is in its memory."""

from __future__ import annotations

import base64
import hashlib
import sys
import time
from collections import Counter
from typing import TYPE_CHECKING, Any

import numpy as np

import transferd
from transferd.client.child import answer, commands
from transferd.client.demo import model

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from transferd import Client

WAIT_S = 60.0


def serve(client: Client) -> None:
    """Does what the parent asks for until it hangs up. The plan comes first."""
    arrivals = commands()
    _, plan = next(arrivals)
    tensors = [model.Tensor(**tensor) for tensor in plan["tensors"]]
    expected = Counter(tensor.layer for tensor in tensors)
    region = client.alloc(model.region_bytes(tensors), name="weights")
    grant = region.grant(imms=range(max(expected) + 1))
    answer(descriptor=base64.b64encode(grant.descriptor).decode())
    rounds = 0
    for word, _ in arrivals:
        match word:
            case "clear":
                region.view[:] = bytes(region.length)
                rounds += 1
                answer(ready=True)
            case "wait":
                for layer, count in sorted(expected.items()):
                    client.counter(layer).wait(rounds * count, WAIT_S)
                answer(landed_ns=time.monotonic_ns())
            case "check":
                counted = all(
                    client.counter(layer).value == rounds * count
                    for layer, count in expected.items()
                )
                found = check(region.view, tensors, plan["config"], plan["ids"])
                answer(counted=counted, **found)


def check(
    memory: memoryview, tensors: list[model.Tensor], config: dict[str, Any], ids: list[int]
) -> dict[str, Any]:
    """Hashes every tensor, and computes the embedding from them where they lie."""
    weights: dict[str, NDArray[Any]] = {}
    hashes: dict[str, str] = {}
    for tensor in tensors:
        part = memory[tensor.offset : tensor.offset + tensor.length]
        hashes[tensor.name] = hashlib.sha256(part).hexdigest()
        weights[tensor.name] = np.frombuffer(part, tensor.dtype).reshape(tensor.shape)
    return {"sha256": hashes, "embedding": model.embed(config, weights, ids).tolist()}


def main() -> int:
    """Runs the receiver: address of its daemon."""
    try:
        with transferd.Client(sys.argv[1], name="demo receiver") as client:
            serve(client)
    except transferd.TransferdError as error:
        answer(error=f"receiver: {error}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
