# SPDX-License-Identifier: Apache-2.0
"""The receiving process of ``transferctl bench``: told what to do by its parent."""

from __future__ import annotations

import base64
import hashlib
import sys
import time
from typing import TYPE_CHECKING

import transferd
from transferd.client.child import answer, commands

if TYPE_CHECKING:
    from transferd import Client, Region

WAIT_S = 60.0


def latency(client: Client, imm: int, count: int) -> None:
    """Waits for writes one by one; tells when each was seen, in ns of CLOCK_MONOTONIC."""
    wait, now = client.counter(imm).wait, time.monotonic_ns
    seen = [0] * count
    answer(ready=True)
    for index in range(count):
        wait(index + 1, WAIT_S)
        seen[index] = now()
    answer(seen_ns=seen)


def landed(client: Client, region: Region, imm: int, count: int, length: int) -> None:
    """Waits for a number of writes in all; tells when, and what the memory holds then."""
    client.counter(imm).wait(count, WAIT_S)
    seen_ns = time.monotonic_ns()
    answer(seen_ns=seen_ns, sha256=hashlib.sha256(region.view[:length]).hexdigest())


def serve(client: Client, length: int, imms: int) -> None:
    """Does what the sender asks for until it hangs up."""
    region = client.alloc(length, name="bench")
    grant = region.grant(imms=range(imms))
    answer(descriptor=base64.b64encode(grant.descriptor).decode())
    for word, command in commands():
        match word:
            case "clear":
                region.view[: command["length"]] = bytes(command["length"])
                answer(ready=True)
            case "latency":
                latency(client, **command)
            case "landed":
                landed(client, region, **command)


def main() -> int:
    """Runs the receiver: address, length of its memory, number of immediates."""
    address, length, imms = sys.argv[1:]
    try:
        with transferd.Client(address, name="bench receiver") as client:
            serve(client, int(length), int(imms))
    except transferd.TransferdError as error:
        answer(error=f"receiver: {error}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
