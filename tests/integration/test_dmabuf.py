# SPDX-License-Identifier: Apache-2.0
"""Memory of devices that NICs reach by dma-buf, on the doubles: verbs', and EFA's libfabric.

A memfd that the daemons and the doubles take for a dma-buf; what posts call it is mapped nowhere.
"""

from __future__ import annotations

import os
import subprocess
from typing import TYPE_CHECKING, Any

import pytest

from transferd.native.client_half import lib
from transferd.native.names import Detail, JobStatus
from transferd.v1 import attach_pb2, types_pb2

from support.cuda_client import SIZE, CudaClient
from support.efaface import face_config
from support.providers import SOFTVERBS
from support.tree import ROOT
from support.twins import Twins
from support.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.slow

RAILS = 2
OFFSET = 4112  # of the region, into the allocation
LENGTH = SIZE - OFFSET
RIGHTS = (types_pb2.RIGHT_WRITE, types_pb2.RIGHT_READ)
OK = (JobStatus.OK, 0)


def verbs() -> dict[str, Any]:
    """Builds the double of libibverbs; the configuration that takes it."""
    subprocess.run(["make", "-s", "-C", str(ROOT / "native"), "softverbs"], check=True)
    return {
        "provider": "verbs",
        "rails": ["soft0", "soft1"],
        "verbs": {"library": SOFTVERBS},
    }


def efa() -> dict[str, Any]:
    """Builds EFA's face; the configuration that takes it."""
    return face_config(RAILS)


NICS = {"verbs": verbs, "efa": efa}


@pytest.fixture(params=NICS)
def twins(request: pytest.FixtureRequest, short_tmp: Path) -> Iterator[Twins]:
    pair = Twins(short_tmp, NICS[request.param]())
    pair.environment["MEMFD_IS_DMABUF"] = "1"
    request.node.transferd_daemons = [pair, pair.second]
    with pair:
        yield pair


class End:
    """A client with device memory, registered from OFFSET on."""

    def __init__(self, daemon: Any) -> None:
        self.fd = os.memfd_create("dmabuf")
        os.ftruncate(self.fd, SIZE)
        self.client = CudaClient(daemon, "end")
        shared = self.client.share_cuda(
            self.fd, dmabuf=True, flush=attach_pb2.CUDA_FLUSH_NOT_NEEDED
        )
        self.region = self.client.registered(shared, offset_bytes=OFFSET)

    def run(self, **entry: Any) -> tuple[JobStatus, int]:
        job = self.client.submit(**entry)
        ended = eventually(lambda: self.client.end_of(job), "the job's end")
        assert ended is not None
        return JobStatus(ended[0]), ended[1]

    def fill(self, data: bytes) -> None:
        os.pwrite(self.fd, data, OFFSET)

    def holds(self) -> bytes:
        return os.pread(self.fd, LENGTH, OFFSET)

    def __enter__(self) -> End:
        self.client.__enter__()
        return self

    def __exit__(self, *_: Any) -> None:
        self.client.__exit__(None, None, None)
        os.close(self.fd)


def test_moves(twins: Twins) -> None:
    """Both ends are a device's: writes of all lengths, the shortest among them, and a read."""
    with End(twins) as near, End(twins.second) as far:
        assert (near.region.rails, far.region.rails) == (RAILS, RAILS)
        assert near.region.length_bytes == LENGTH
        granted = far.client.grant(far.region.region, RIGHTS)
        handle = near.client.open(granted.descriptor).handle
        counter = far.client.counters[granted.counter_slots[2]]
        data = os.urandom(LENGTH)
        near.fill(data)
        for count, length in enumerate((1, 33, 4096, 100_003, LENGTH), start=1):
            far.fill(bytes(LENGTH))
            ended = near.run(
                op=lib.TFD_OP_WRITE,
                src_region=near.region.region,
                dst_grant=handle,
                length=length,
                imm=2,
            )
            assert ended == OK
            eventually(lambda: counter.value == count, "the count")  # noqa: B023
            assert far.holds() == data[:length] + bytes(LENGTH - length)
        other = os.urandom(LENGTH)
        far.fill(other)
        ended = near.run(
            op=lib.TFD_OP_READ, src_region=near.region.region, dst_grant=handle, length=LENGTH
        )
        assert ended == OK
        assert near.holds() == other
        assert os.pread(far.fd, OFFSET, 0) == bytes(OFFSET)


def test_a_device_cannot_be_mapped_from_another_host(twins: Twins) -> None:
    with End(twins) as near, End(twins.second) as far:
        granted = far.client.grant(far.region.region)
        handle = near.client.open(granted.descriptor).handle
        assert near.client.map(handle).error.reason == "MAP_OTHER_HOST"


@pytest.mark.parametrize(
    ("nics", "environment"),
    [("verbs", {"SOFTVERBS": "dmabuf=0"}), ("efa", {"EFAFACE_DMABUF": "95"})],
)
def test_nics_that_take_none(
    short_tmp: Path, request: pytest.FixtureRequest, nics: str, environment: dict[str, str]
) -> None:
    """The region is registered all the same, on no rail; a job on it says what there is to do."""
    pair = Twins(short_tmp, NICS[nics]())
    pair.environment.update({"MEMFD_IS_DMABUF": "1", **environment})
    request.node.transferd_daemons = [pair, pair.second]
    with pair, End(pair) as near, End(pair.second) as far:
        assert (near.region.rails, far.region.rails) == (0, 0)
        granted = far.client.grant(far.region.region, RIGHTS)
        ended = near.run(
            op=lib.TFD_OP_WRITE,
            src_region=near.region.region,
            dst_grant=near.client.open(granted.descriptor).handle,
            length=LENGTH,
            imm=2,
        )
        assert ended == (JobStatus.INVALID, Detail.DEVICE_MEMORY)
