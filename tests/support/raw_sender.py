# SPDX-License-Identifier: Apache-2.0
"""A raw session that is ready to send: any entry, any table, and how it ended."""

from __future__ import annotations

import contextlib
import fcntl
import os
from typing import TYPE_CHECKING

import transferd
from transferd.native.client_half import ffi, lib
from transferd.native.names import Detail, JobStatus
from transferd.v1 import region_pb2, region_pb2_grpc, types_pb2

from support.raw_session import RawSession
from support.waiting import WAIT_S, eventually

if TYPE_CHECKING:
    from collections.abc import Iterator

    from support.daemon import DaemonProcess

LENGTH = 1 << 16
IMMS = range(8, 16)
IMM = 9


class RawSender:
    """A raw session with a region of its own and a grant of the other daemon open.

    Attributes:
        raw: The session.
        region: Handle of LENGTH bytes.
        grant: Handle of the open grant of LENGTH bytes, to write and to read, immediates IMMS.
        target: What it is a grant of.
        counter: Of IMM at the receiver.
    """

    def __init__(
        self, raw: RawSession, region: int, grant: int, target: transferd.Region,
        receiver: transferd.Client,
    ) -> None:  # fmt: skip
        self.raw = raw
        self.region = region
        self.grant = grant
        self.target = target
        self.counter = receiver.counter(IMM)

    def submit(self, **fields: int) -> int:
        """Puts an entry on the ring, a correct write but for these fields; returns its job."""
        good = {
            "op": int(lib.TFD_OP_WRITE),
            "src_region": self.region,
            "dst_grant": self.grant,
            "length": 1,
            "imm": IMM,
        }
        return self.raw.submit(**(good | fields))

    def end_of(self, job: int) -> tuple[JobStatus, Detail]:
        """Waits for a job; returns how it ended."""
        end = eventually(lambda: self.raw.end_of(job), "the job ends")
        assert end is not None
        status, detail = end
        return JobStatus(status), Detail(detail)

    def end(self, **fields: int) -> tuple[JobStatus, Detail]:
        """Submits and waits."""
        return self.end_of(self.submit(**fields))

    def fill(self, table: bytes, offset: int = 0) -> None:
        """Writes into the arena."""
        ffi.memmove(self.raw.arena + offset, table, len(table))


@contextlib.contextmanager
def raw_sender(near: DaemonProcess, far: DaemonProcess) -> Iterator[RawSender]:
    """Attaches to one daemon, with memory at the other."""
    memfd = os.memfd_create("tests", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(memfd, LENGTH)
    fcntl.fcntl(memfd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
    with (
        transferd.Client(far.socket) as receiver,
        RawSession(near) as raw,
        near.channel() as channel,
    ):
        target = receiver.alloc(LENGTH)
        descriptor = target.grant(imms=IMMS, rights={"write", "read"}).descriptor
        region = raw.register(channel, memfd)
        os.close(memfd)
        opened = region_pb2_grpc.RegionServiceStub(channel).OpenDescriptors(
            region_pb2.OpenDescriptorsRequest(descriptors=[descriptor]),
            metadata=raw.metadata,
            timeout=WAIT_S,
        )
        (grant,) = opened.grants
        assert list(grant.rights) == [types_pb2.RIGHT_WRITE, types_pb2.RIGHT_READ]
        yield RawSender(raw, region, grant.handle, target, receiver)
