# SPDX-License-Identifier: Apache-2.0
"""A client in a guest, in one of two roles; run as a program, by test_two_hosts.py.

``receive BYTES WRITES`` lends memory, prints its descriptor and, once told by SIGUSR1, the hash of
what is there and the count. ``send BYTES WRITES SEED DESCRIPTOR`` writes random bytes there, in so
many writes, and prints the hash of what it sent and the path that they took.
"""

from __future__ import annotations

import hashlib
import random
import signal
import sys

import transferd

IMM = 7
WAIT_S = 300.0
TOLD = {signal.SIGUSR1}


def pieces(length: int, count: int) -> list[tuple[int, int]]:
    """Cuts a length into so many parts that differ in length; begin and end of each."""
    cuts = [length * number * (number + 3) // (count * (count + 3)) for number in range(count)]
    return list(zip(cuts, [*cuts[1:], length], strict=True))


def receive(client: transferd.Client, length: int, writes: int) -> None:
    """Lends memory, and tells what has landed in it and how often."""
    region = client.alloc(length)
    grant = region.grant(rights={"write"}, imms=[IMM])
    counter = client.counter(IMM)
    print(grant.descriptor.hex(), flush=True)
    counter.wait(writes, WAIT_S)
    signal.sigwait(TOLD)  # what comes too often, or too late, has come by now
    print(hashlib.sha256(region.view).hexdigest(), counter.value, flush=True)


def send(client: transferd.Client, length: int, writes: int, seed: int, descriptor: bytes) -> None:
    """Writes random bytes."""
    region = client.alloc(length)
    region.view[:] = random.Random(seed).randbytes(length)
    jobs = [
        client.write(region[begin:end], descriptor, dst_offset=begin, imm=IMM)
        for begin, end in pieces(length, writes)
    ]
    for job in jobs:
        job.wait(WAIT_S)
    print(hashlib.sha256(region.view).hexdigest(), jobs[-1].path, flush=True)


def main(arguments: list[str]) -> None:
    """Plays its role."""
    role, length, writes, *more = arguments
    with transferd.Client() as client:
        if role == "receive":
            receive(client, int(length), int(writes))
        else:
            send(client, int(length), int(writes), int(more[0]), bytes.fromhex(more[1]))


if __name__ == "__main__":
    signal.pthread_sigmask(signal.SIG_BLOCK, TOLD)
    main(sys.argv[1:])
