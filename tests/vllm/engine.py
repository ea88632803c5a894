# SPDX-License-Identifier: Apache-2.0
"""A vLLM engine as a process of its own: what tests/support/engines.py starts.

Reads commands from descriptor FD, a line of JSON each, and answers in the same way:

    {"generate": ID, "prompt": [token, …], "tokens": N, "kv": {…} or null}
    {"abort": ID}
    {"metrics": ID}
    {"stop": true}

Answers: ``{"up": true}`` first; when a request has ended ``{"id": ID, "tokens": […], "kv": {…},
"reason": …, "cached": N, "times": [first, last]}`` (monotonic seconds), when it failed ``{"id": ID,
"error": TEXT}``.
"""

from __future__ import annotations

import asyncio
import json
import socket
import sys
import time
from typing import Any

Object = dict[str, Any]


class Commands:
    """Carries out what it is told, one task for each request."""

    def __init__(self, engine: Any, write: Any) -> None:
        self.engine = engine
        self.write = write
        self.tasks: set[asyncio.Task[None]] = set()

    def answer(self, **values: Any) -> None:
        """Sends one line."""
        self.write(json.dumps(values).encode() + b"\n")

    def begin(self, command: Object) -> None:
        """Starts a request."""
        task = asyncio.get_running_loop().create_task(self.generate(command))
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    async def generate(self, command: Object) -> None:
        """Runs a request to its end."""
        number = command["generate"]
        try:
            self.answer(**await self._generate(number, command))
        except Exception as error:
            self.answer(id=number, error=f"{type(error).__name__}: {error}")

    async def _generate(self, number: str, command: Object) -> Object:
        from vllm.sampling_params import RequestOutputKind, SamplingParams

        kv = command.get("kv")
        params = SamplingParams(
            max_tokens=command["tokens"],
            temperature=0,
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
            extra_args={"kv_transfer_params": kv} if kv else None,
        )
        tokens: list[int] = []
        times: list[float] = []
        answered: Object = {}
        async for output in self.engine.generate(
            {"prompt_token_ids": command["prompt"]}, params, number
        ):
            (part,) = output.outputs
            if part.token_ids:
                times.append(time.monotonic())
            tokens += part.token_ids
            answered = {
                "kv": output.kv_transfer_params,
                "reason": part.finish_reason,
                "cached": output.num_cached_tokens,
            }
        return {"id": number, "tokens": tokens, "times": times[:1] + times[-1:], **answered}

    def metrics(self, number: str) -> None:
        """Tells the values of all Prometheus metrics of this process."""
        from prometheus_client import REGISTRY

        found: dict[str, float] = {}
        for family in REGISTRY.collect():
            for sample in family.samples:
                found[sample.name] = found.get(sample.name, 0.0) + sample.value
        self.answer(id=number, metrics=found)


async def serve(channel: socket.socket, arguments: Object) -> None:
    """Starts the engine and takes commands until it is told to stop, or the other end is gone."""
    from vllm.config import KVTransferConfig
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    if "kv_transfer_config" in arguments:
        arguments["kv_transfer_config"] = KVTransferConfig(**arguments["kv_transfer_config"])
    engine = AsyncLLM.from_engine_args(AsyncEngineArgs(**arguments))
    reader, writer = await asyncio.open_connection(sock=channel, limit=1 << 24)
    commands = Commands(engine, writer.write)
    commands.answer(up=True)
    while line := await reader.readline():
        command = json.loads(line)
        if "generate" in command:
            commands.begin(command)
        elif "abort" in command:
            await engine.abort(command["abort"])
        elif "metrics" in command:
            await engine.do_log_stats()
            commands.metrics(command["metrics"])
        else:
            break
    engine.shutdown()
    writer.close()


if __name__ == "__main__":
    asyncio.run(serve(socket.socket(fileno=int(sys.argv[1])), json.loads(sys.argv[2])))
