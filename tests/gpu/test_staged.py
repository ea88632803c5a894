# SPDX-License-Identifier: Apache-2.0
"""GPU memory through host memory, on a real GPU: bytes, counts, kinds of memory, ends."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from typing import TYPE_CHECKING

import numpy as np
import pytest

import transferd
from transferd import JobStatus

from support import cuda_peer
from support.staged import gpus, helper_pid, staged_pair
from support.waiting import WAIT_S, eventually

if TYPE_CHECKING:
    import random
    from collections.abc import Iterator

    from transferd import Client

    from support.daemon import DaemonProcess
    from support.gpu import Buffer, Gpu

    Pair = tuple[DaemonProcess, DaemonProcess]

pytestmark = [pytest.mark.gpu, pytest.mark.slow]

MIB = 1 << 20
OK = JobStatus.OK
RIGHTS = {"read", "write"}
SIZES = (0, 2, 3, 15, 16, 17, 255, 4096, 28_671, 32_767, 32_768, 65_537, MIB + 1, 3 * MIB)


@pytest.fixture(scope="module")
def shared_pair() -> Iterator[Pair]:
    with staged_pair({"staging": "on"}) as pair:
        yield pair


@pytest.fixture
def receiver(gpu: Gpu, shared_pair: Pair) -> Iterator[Client]:
    with transferd.Client(shared_pair[1].socket, name="receiver") as made:
        yield made


def allocated(gpu: Gpu, kind: str) -> Buffer:
    return gpu.malloc(8 * MIB) if kind == "malloc" else gpu.vmm(4)


def provider(job: transferd.Job) -> str:
    assert job.result is not None
    return str(job.result.path.provider)


@pytest.mark.parametrize("kind", ["malloc", "vmm"])
def test_writes_and_reads_of_every_length(
    gpu: Gpu, sender: Client, receiver: Client, kind: str, seeded: random.Random
) -> None:
    source, target = allocated(gpu, kind), allocated(gpu, kind)
    data = seeded.randbytes(8 * MIB)
    source.write(data)
    target.clear()
    gpu.settle()
    wanted = bytearray(8 * MIB)
    region, far = sender.register(source), receiver.register(target)
    grant = far.grant(rights=RIGHTS, imms=range(4))
    for count, size in enumerate(SIZES, start=1):
        src, dst = seeded.randrange(4 * MIB), seeded.randrange(4 * MIB)
        job = sender.write(region[src : src + size], grant.descriptor, dst, imm=1)
        assert job.wait(WAIT_S) is OK
        receiver.counter(1).wait(count, WAIT_S)
        wanted[dst : dst + size] = data[src : src + size]
        assert target.read() == wanted
        assert not size or provider(job) == "staged"
        assert sender.read(grant.descriptor, region[0:size], dst).wait(WAIT_S) is OK
        assert source.read(0, size) == bytes(wanted[dst : dst + size])
        source.write(data)
        gpu.settle()
    assert receiver.counter(1).value == len(SIZES)


@pytest.mark.parametrize("page", [256, 4096, 65_536])
def test_pages(
    gpu: Gpu, sender: Client, receiver: Client, page: int, seeded: random.Random
) -> None:
    count = min(8 * MIB // page, 1024)
    source, target = gpu.malloc(8 * MIB), gpu.malloc(8 * MIB)
    data = np.frombuffer(seeded.randbytes(8 * MIB), np.uint8)
    source.write(data.tobytes())
    gpu.settle()
    region, far = sender.register(source), receiver.register(target)
    grant = far.grant(rights=RIGHTS, imms=range(4))
    order = np.random.default_rng(page)
    src, dst = order.permutation(count), order.permutation(count)
    job = sender.write_pages(region, src, grant.descriptor, dst, page, imm=2)
    assert job.wait(WAIT_S) is OK
    receiver.counter(2).wait(count, WAIT_S)
    assert receiver.counter(2).value == count
    landed = np.frombuffer(target.read(), np.uint8)[: count * page].reshape(count, page)
    assert (landed[dst] == data[: count * page].reshape(count, page)[src]).all()
    assert provider(job) == "staged"


def test_host_to_gpu_and_back(
    gpu: Gpu, sender: Client, receiver: Client, seeded: random.Random
) -> None:
    plain, target = sender.alloc(MIB), gpu.malloc(MIB)
    plain.view[:] = seeded.randbytes(MIB)
    grant = receiver.register(target).grant(rights=RIGHTS, imms=range(4))
    job = sender.write(plain, grant.descriptor, imm=3)
    assert job.wait(WAIT_S) is OK
    assert target.read() == bytes(plain.view)
    assert provider(job) == "staged"
    back = sender.alloc(MIB)
    assert sender.read(grant.descriptor, back).wait(WAIT_S) is OK
    assert bytes(back.view) == bytes(plain.view)


def test_a_killed_helper_costs_its_jobs_alone(
    gpu: Gpu, sender: Client, receiver: Client, shared_pair: Pair
) -> None:
    source, target = gpu.malloc(MIB), gpu.malloc(MIB)
    grant = receiver.register(target).grant(rights=RIGHTS, imms=range(4))
    region = sender.register(source)
    assert sender.write(region, grant.descriptor, imm=1).wait(WAIT_S) is OK
    before = helper_pid(shared_pair[0])
    os.kill(before, signal.SIGKILL)
    eventually(lambda: gpus(shared_pair[0])[0].pid != before, "the daemon has seen it")

    def goes() -> bool:
        try:
            return sender.write(region, grant.descriptor, imm=1).wait(WAIT_S) is OK
        except transferd.TransferdError:
            return False

    eventually(goes, "another helper copies")
    assert helper_pid(shared_pair[0]) != before


def test_memory_of_a_killed_client_is_given_back(
    gpu: Gpu, sender: Client, shared_pair: Pair
) -> None:
    length = 1 << 30
    plain = sender.alloc(MIB)
    with cuda_peer.running(shared_pair[1].socket, "malloc", length) as peer:
        assert sender.write(plain, peer.descriptor, imm=1).wait(WAIT_S) is OK
        before = gpu.free_bytes()
        peer.process.kill()
        peer.process.wait()
        eventually(lambda: gpu.free_bytes() - before >= length, "the memory is back at the driver")


def test_the_helper_is_told_of(
    gpu: Gpu, sender: Client, receiver: Client, shared_pair: Pair
) -> None:
    grant = receiver.register(gpu.malloc(MIB)).grant(rights=RIGHTS, imms=range(4))
    assert sender.write(sender.alloc(MIB), grant.descriptor, imm=1).wait(WAIT_S) is OK
    (told,) = gpus(shared_pair[1])
    assert told.state == "READY"
    if not shutil.which("nvidia-smi"):  # a container need not have it
        pytest.skip("nvidia-smi is not here, whose name of the GPU is to be the same")
    named = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=True).stdout
    assert told.uuid in named
