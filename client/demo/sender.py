# SPDX-License-Identifier: Apache-2.0
"""The demo's sending process: the model's file, one WriteImm for each tensor, layer by layer."""

from __future__ import annotations

import base64
import hashlib
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import transferd
from transferd.client.child import answer, commands
from transferd.client.demo import model

if TYPE_CHECKING:
    from transferd import Client, Region

WAIT_S = 60.0


def serve(client: Client, folder: Path) -> None:
    """Does what the parent asks for until it hangs up."""
    config, tensors, values = model.load(folder)
    region = client.alloc(model.region_bytes(tensors), name="weights")
    for tensor in tensors:
        part = region[tensor.offset : tensor.offset + tensor.length]
        part.view[:] = values[tensor.name].tobytes()
    ids = model.tokenize(folder, model.SENTENCE)
    answer(tensors=[asdict(tensor) for tensor in tensors], config=config, ids=ids)
    for word, command in commands():
        match word:
            case "warm":
                client.warm(base64.b64decode(command["descriptor"]))
                answer(ready=True)
            case "send":
                answer(**send(client, region, tensors, base64.b64decode(command["descriptor"])))
            case "hashes":
                answer(
                    sha256={
                        name: hashlib.sha256(value.tobytes()).hexdigest()
                        for name, value in values.items()
                    },
                    embedding=model.embed(config, values, ids).tolist(),
                )


def send(
    client: Client, region: Region, tensors: list[model.Tensor], descriptor: bytes
) -> dict[str, Any]:
    """Writes every tensor; the immediate is the number of its layer."""
    started_ns = time.monotonic_ns()
    jobs = client.submit(
        transferd.Write(
            src=region[tensor.offset : tensor.offset + tensor.length],
            dst=descriptor,
            dst_offset=tensor.offset,
            imm=tensor.layer,
        )
        for tensor in tensors
    )
    for job in jobs:
        job.wait(WAIT_S)
    return {"started_ns": started_ns, "path": str(jobs[-1].path), "provider": client.provider}


def main() -> int:
    """Runs the sender: address of its daemon, folder of the model."""
    try:
        with transferd.Client(sys.argv[1], name="demo sender") as client:
            serve(client, Path(sys.argv[2]))
    except transferd.TransferdError as error:
        answer(error=f"sender: {error}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
