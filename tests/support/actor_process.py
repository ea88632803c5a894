# SPDX-License-Identifier: Apache-2.0
"""The process behind support.actor.Actor: a client that is about to be killed.

Says "ready" (a receiver: its descriptor), then works until its end.
"""

from __future__ import annotations

import signal
import sys

import transferd

BATCH = 4


def send(client: transferd.Client, length: int, imm: int, descriptor: bytes) -> None:
    """Writes without end; says "sending" while bytes are in flight."""
    source = client.alloc(length)
    client.warm(descriptor)
    print("ready", flush=True)
    while True:
        jobs = [client.write(source, descriptor, imm=imm) for _ in range(BATCH)]
        print("sending", flush=True)
        for job in jobs:
            job.wait()


def arm(client: transferd.Client, length: int, imm: int, descriptor: bytes) -> None:
    """Has jobs and launches wait for watchers, starts some; says "sending" then."""
    source = client.alloc(length)
    job = transferd.Write(src=source, dst=descriptor, imm=imm)
    watcher = client.watcher()
    device = client.watcher(device=True)
    plan = client.plan(job, table=True)
    jobs = [client.arm((watcher, device)[i % 2], 1 + i, (job, plan)[i % 3 % 2]) for i in range(200)]
    launched = [plan.launch() for _ in range(4)]
    watcher.bump(8)
    print("sending", flush=True)
    jobs[-1].wait()
    launched[-1].wait()


def receive(client: transferd.Client, length: int, imm: int) -> None:
    """Grants memory and lets others write into it."""
    grant = client.alloc(length).grant(imms=[imm])
    print(grant.descriptor.hex(), flush=True)
    signal.pause()


def send_messages(client: transferd.Client, length: int, descriptor: bytes) -> None:
    """Sends numbered messages without end; says "sending" while some are under way."""
    number = 0
    while True:
        jobs = []
        for _ in range(BATCH):
            data = number.to_bytes(8, "little").ljust(length, b"m")
            jobs.append(client.send(descriptor, data))
            number += 1
        print("sending", flush=True)
        for job in jobs:
            job.wait()


def keep_mailbox(client: transferd.Client, length: int) -> None:
    """Has a mailbox of two slots, from which it receives nothing."""
    mailbox = client.mailbox(slots=2, slot_bytes=length)
    print(mailbox.descriptor.hex(), flush=True)
    signal.pause()


def main() -> None:
    """Runs one role: ROLE SOCKET LENGTH IMM [DESCRIPTOR]."""
    role, socket, length, imm = sys.argv[1:5]
    with transferd.Client(socket, name=role) as client:
        if role == "send":
            send(client, int(length), int(imm), bytes.fromhex(sys.argv[5]))
        elif role == "arm":
            arm(client, int(length), int(imm), bytes.fromhex(sys.argv[5]))
        elif role == "send messages":
            send_messages(client, int(length), bytes.fromhex(sys.argv[5]))
        elif role == "mailbox":
            keep_mailbox(client, int(length))
        else:
            receive(client, int(length), int(imm))


if __name__ == "__main__":
    main()
