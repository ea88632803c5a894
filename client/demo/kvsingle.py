# SPDX-License-Identifier: Apache-2.0
"""A single engine of ``transferd demo kv``: the same model without transferd, to compare with."""

from __future__ import annotations

import json
import sys

import numpy as np

from transferd.client.demo.kvengine import CHUNK, CONFIG, tell
from transferd.client.demo.llama import Llama


def generate(model: Llama, prompt: list[int], count: int) -> list[int]:
    """Computes a prompt in chunks, then tokens one by one."""
    pages = np.arange(CONFIG.pages)
    token = 0
    for first in range(0, len(prompt), CHUNK):
        token = model.forward(prompt[first : first + CHUNK], first, pages)
    tokens = [token]
    while len(tokens) < count:
        tokens.append(model.forward(tokens[-1:], len(prompt) + len(tokens) - 1, pages))
    return tokens


def main() -> int:
    """Answers each request of the driver until it hangs up."""
    model = Llama(CONFIG, np.zeros(CONFIG.cache_shape, dtype=np.float32))
    tell("ready")
    for line in sys.stdin:
        command = json.loads(line)
        tokens = generate(model, command["prompt"], command["count"])
        tell("single", id=command["id"], tokens=tokens)
    return 0


if __name__ == "__main__":
    sys.exit(main())
