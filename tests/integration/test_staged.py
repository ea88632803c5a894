# SPDX-License-Identifier: Apache-2.0
"""GPU memory that no NIC reaches, between two daemons: through host memory, by helper processes."""

from __future__ import annotations

import contextlib
import functools
import os
import urllib.request
from typing import TYPE_CHECKING

import numpy as np
import pytest

import transferd
from transferd import JobStatus
from transferd.client.ctl import main as ctl
from transferd.native.client_half import lib
from transferd.native.names import Detail

from support.cuda_client import CudaClient
from support.softcuda import MIB, SoftBuffer, mapped_by, uuid
from support.staged import gpu_config, gpus, helper_pid, soft_driver, staged_pair
from support.waiting import WAIT_S, eventually

if TYPE_CHECKING:
    import random
    from collections.abc import Iterator

    from conftest import MakeDaemon

    from transferd import Client, Grant, Region

    from support.daemon import DaemonProcess
    from support.softcuda import SoftCuda

    Pair = tuple[DaemonProcess, DaemonProcess]

pytestmark = pytest.mark.slow

LENGTH = 4 * MIB
RIGHTS = {"read", "write"}
OK = JobStatus.OK
SIZES = (0, 2, 15, 4096, 5001, 65_536, 100_003, MIB, MIB + 1, 3 * MIB + 7)


@pytest.fixture(scope="module")
def shared_pair() -> Iterator[Pair]:
    with staged_pair() as pair:
        yield pair


@pytest.fixture(scope="module")
def soft() -> Iterator[SoftCuda]:
    with soft_driver() as made:
        yield made


@pytest.fixture
def sender(soft: SoftCuda, shared_pair: Pair) -> Iterator[Client]:
    with transferd.Client(shared_pair[0].socket, name="sender") as made:
        yield made


@pytest.fixture(params=["other daemon", "same daemon"])
def receiver(soft: SoftCuda, shared_pair: Pair, request: pytest.FixtureRequest) -> Iterator[Client]:
    daemon = shared_pair[request.param == "other daemon"]
    with transferd.Client(daemon.socket, name="receiver") as made:
        yield made


def on_gpu(client: Client, soft: SoftCuda) -> tuple[memoryview, Region]:
    buffer = SoftBuffer(soft, LENGTH)
    return buffer.view, client.register(buffer)


def on_host(client: Client) -> tuple[memoryview, Region]:
    region = client.alloc(LENGTH)
    return region.view, region


def granted(region: Region) -> Grant:
    return region.grant(rights=RIGHTS, imms=range(16))


@pytest.mark.parametrize("way", ["gpu to gpu", "gpu to host", "host to gpu"])
def test_writes_and_reads(
    soft: SoftCuda, sender: Client, receiver: Client, way: str, seeded: random.Random
) -> None:
    here, source = on_gpu(sender, soft) if way.startswith("gpu") else on_host(sender)
    there, target = on_gpu(receiver, soft) if way.endswith("gpu") else on_host(receiver)
    grant = granted(target)
    here[:] = seeded.randbytes(LENGTH)
    wanted = bytearray(LENGTH)
    for count, size in enumerate(SIZES, start=1):
        src, dst = seeded.randrange(LENGTH - size), seeded.randrange(LENGTH - size)
        job = sender.write(source[src : src + size], grant.descriptor, dst, imm=1)
        assert job.wait(WAIT_S) is OK
        wanted[dst : dst + size] = here[src : src + size]
        receiver.counter(1).wait(count, WAIT_S)
        assert receiver.counter(1).value == count
        assert there.tobytes() == wanted
        if size:
            assert job.result is not None
            assert job.result.path.provider == "staged"
    there[:] = seeded.randbytes(LENGTH)
    for size in SIZES:
        src, dst = seeded.randrange(LENGTH - size), seeded.randrange(LENGTH - size)
        job = sender.read(grant.descriptor, source[dst : dst + size], src)
        assert job.wait(WAIT_S) is OK
        assert here[dst : dst + size].tobytes() == there[src : src + size].tobytes()
    assert receiver.counter(1).value == len(SIZES)


@pytest.mark.parametrize("page", [64, 1000, 4096, 65_536])
def test_pages(
    soft: SoftCuda, sender: Client, receiver: Client, page: int, seeded: random.Random
) -> None:
    here, source = on_gpu(sender, soft)
    there, target = on_gpu(receiver, soft)
    grant = granted(target)
    here[:] = seeded.randbytes(LENGTH)
    there[:] = bytes(LENGTH)
    count = min(LENGTH // page, 500)
    order = np.random.default_rng(page)
    src, dst = order.permutation(count), order.permutation(count)
    job = sender.write_pages(source, src, grant.descriptor, dst, page, imm=2)
    assert job.wait(WAIT_S) is OK
    receiver.counter(2).wait(count, WAIT_S)
    assert receiver.counter(2).value == count
    pages = np.frombuffer(there, np.uint8)[: count * page].reshape(count, page)
    wanted = np.frombuffer(here, np.uint8)[: count * page].reshape(count, page)
    assert (pages[dst] == wanted[src]).all()


def test_many_jobs_of_both_kinds_and_both_ways(
    soft: SoftCuda, sender: Client, receiver: Client, seeded: random.Random
) -> None:
    piece, count = 50_000, 60
    one, near = on_gpu(sender, soft)
    two, far = on_gpu(receiver, soft)
    host, plain = on_host(sender)
    for view in (one, two, host):
        view[:] = seeded.randbytes(LENGTH)
    half = count * piece
    assert 2 * half > LENGTH > half
    kept = two[:half].tobytes()  # what goes back is not what comes
    there, back = granted(receiver.register(SoftBuffer(soft, LENGTH))), granted(near)
    jobs = []
    for i in range(count):
        at = i * piece
        source = (near, plain)[i % 2]
        jobs.append(sender.write(source[at : at + piece], there.descriptor, at, imm=3))
        jobs.append(receiver.write(far[at : at + piece], back.descriptor, at, imm=4))
    assert {job.wait(WAIT_S) for job in jobs} == {OK}
    receiver.counter(3).wait(count, WAIT_S)
    sender.counter(4).wait(count, WAIT_S)
    assert (receiver.counter(3).value, sender.counter(4).value) == (count, count)
    assert one[:half].tobytes() == kept


def test_scatter_from_a_gpu(
    soft: SoftCuda, sender: Client, receiver: Client, seeded: random.Random
) -> None:
    here, source = on_gpu(sender, soft)
    there, target = on_gpu(receiver, soft)
    plain_view, plain = on_host(receiver)
    here[:] = seeded.randbytes(LENGTH)
    grants = [granted(target), granted(plain)]
    parts = [(grant.descriptor, i * 1000, 0, 1000) for i, grant in enumerate(grants)]
    assert sender.scatter(source, parts, imm=5).wait(WAIT_S) is OK
    receiver.counter(5).wait(2, WAIT_S)
    assert there[:1000] == here[:1000]
    assert plain_view[:1000] == here[1000:2000]


def test_memory_that_is_deregistered_is_let_go_of(
    soft: SoftCuda, sender: Client, receiver: Client, shared_pair: Pair
) -> None:
    buffer = SoftBuffer(soft, LENGTH)
    source = sender.register(buffer)
    _, target = on_host(receiver)
    job = sender.write(source[0:100], granted(target).descriptor, imm=6)
    assert job.wait(WAIT_S) is OK
    pid = helper_pid(shared_pair[0])
    before = mapped_by(pid)
    assert before
    source.close()
    assert mapped_by(pid) == before - 1
    buffer.free()


def test_one_byte_is_refused_on_its_way_to_a_gpu(
    soft: SoftCuda, sender: Client, receiver: Client
) -> None:
    here, source = on_gpu(sender, soft)
    there, target = on_gpu(receiver, soft)
    back, plain = on_host(receiver)
    here[0], grant = 77, granted(target)
    for job in (
        sender.write(source[0:1], grant.descriptor, imm=11),
        sender.write_pages(source, [0, 5], grant.descriptor, [0, 9], 1, imm=11),
        sender.scatter(source, [(grant.descriptor, 0, 0, 1)], imm=11),
        sender.read(grant.descriptor, source[0:1]),
    ):
        with pytest.raises(transferd.JobFailed) as caught:
            job.wait(WAIT_S)
        assert (caught.value.status, caught.value.detail) == (JobStatus.INVALID, "ONE_BYTE")
    assert there[0] == 0
    assert sender.write(source[0:1], granted(plain).descriptor, imm=11).wait(WAIT_S) is OK
    assert back[0] == 77


def test_host_memory_does_not_go_by_it(sender: Client, receiver: Client) -> None:
    _, source = on_host(sender)
    _, target = on_host(receiver)
    job = sender.write(source, granted(target).descriptor, imm=7)
    assert job.wait(WAIT_S) is OK
    assert "staged" not in str(job.path)


def test_what_is_told(
    soft: SoftCuda,
    sender: Client,
    receiver: Client,
    shared_pair: Pair,
    capsys: pytest.CaptureFixture[str],
) -> None:
    _, source = on_gpu(sender, soft)
    _, target = on_gpu(receiver, soft)
    job = sender.write(source, granted(target).descriptor, imm=8)
    assert job.wait(WAIT_S) is OK
    (gpu,) = gpus(shared_pair[0])
    assert (gpu.state, gpu.name, gpu.restarts) == ("READY", "softcuda 0", 0)
    assert gpu.memories >= 1
    assert gpu.bytes_to_host >= LENGTH
    assert gpu.copies_to_host >= 1
    ctl.cli.main(["gpus", "--socket", shared_pair[0].socket], standalone_mode=False)
    shown = capsys.readouterr().out
    assert gpu.uuid in shown
    assert "READY" in shown
    with urllib.request.urlopen(f"http://{shared_pair[0].http_address}/metrics", timeout=5) as told:
        metrics = told.read().decode()
    assert f'transferd_gpu_helper_up{{gpu="{gpu.uuid}"}} 1.0' in metrics
    assert f'transferd_gpu_copied_bytes_total{{direction="to_host",gpu="{gpu.uuid}"}}' in metrics


@pytest.mark.parametrize(
    ("library", "said"),
    [("/nowhere/libcuda.so.1", "cannot be loaded"), ("libc.so.6", "update NVIDIA's driver")],
)
def test_without_a_driver_host_memory_goes_on(
    soft: SoftCuda, make_daemon: MakeDaemon, library: str, said: str
) -> None:
    near, far = make_daemon(gpu=gpu_config(library)), make_daemon(gpu=gpu_config())
    with transferd.Client(near.socket) as sender, transferd.Client(far.socket) as receiver:
        _, target = on_host(receiver)
        grant = granted(target)
        _, source = on_gpu(sender, soft)
        job = sender.write(source[0:64], grant.descriptor, imm=1)
        with pytest.raises(transferd.JobFailed):
            job.wait(WAIT_S)
        eventually(lambda: said in near.log(), "it says why")
        _, plain = on_host(sender)
        job = sender.write(plain[0:64], grant.descriptor, imm=2)
        assert job.wait(WAIT_S) is OK
        assert receiver.counter(2).value == 1


def test_where_it_is_off_memory_of_a_gpu_is_refused(
    soft: SoftCuda, make_daemon: MakeDaemon
) -> None:
    near, far = make_daemon(gpu={"staging": "off"}), make_daemon(gpu=gpu_config())
    with transferd.Client(near.socket) as sender, transferd.Client(far.socket) as receiver:
        _, target = on_host(receiver)
        _, source = on_gpu(sender, soft)
        job = sender.write(source[0:64], granted(target).descriptor, imm=1)
        with pytest.raises(transferd.JobFailed) as caught:
            job.wait(WAIT_S)
        assert (caught.value.status, caught.value.detail) == (JobStatus.INVALID, "DEVICE_MEMORY")


def test_a_region_that_is_a_part_of_its_allocation(soft: SoftCuda, shared_pair: Pair) -> None:
    near, far = shared_pair
    one, two = SoftBuffer(soft, LENGTH), SoftBuffer(soft, LENGTH)
    one.view[:], two.view[:] = bytes(range(256)) * (LENGTH // 256), bytes(LENGTH)
    with CudaClient(near, "from") as sender, CudaClient(far, "to") as receiver:
        regions = []
        for client, buffer, offset in ((sender, one, 4096), (receiver, two, 65_536)):
            shared = client.share_cuda(
                device_uuid=uuid(),
                base=buffer.address,
                size_bytes=LENGTH,
                ipc_handle=soft.handle(buffer.address),
            )
            regions.append(client.registered(shared, offset_bytes=offset, length_bytes=8192).region)
        granted = receiver.grant(regions[1])
        handle = sender.open(granted.descriptor).handle
        last = sender.submit(
            op=lib.TFD_OP_WRITE,
            src_region=regions[0],
            src_offset=8192 - 100,
            dst_grant=handle,
            dst_offset=8192 - 100,
            length=100,
        )
        first = sender.submit(
            op=lib.TFD_OP_WRITE, src_region=regions[0], dst_grant=handle, length=50
        )
        for job in (first, last):
            end = eventually(functools.partial(sender.end_of, job), "the job's end")
            assert end == (OK, Detail.NONE)
    wanted = bytearray(LENGTH)
    wanted[65_536 : 65_536 + 50] = one.view[4096 : 4096 + 50]
    at = 8192 - 100
    wanted[65_536 + at : 65_536 + 8192] = one.view[4096 + at : 4096 + 8192]
    assert two.view.tobytes() == wanted


@pytest.mark.long
def test_sessions_whose_connections_are_their_own_share_the_staged_ones(
    soft: SoftCuda, make_daemon: MakeDaemon
) -> None:
    gpu = gpu_config() | {"staging_bytes": "4MiB"}  # 15 slots
    tenant = {"name": "t", "uids": [os.getuid()], "lease_sessions": True, "shm_paths": True}
    near, far = make_daemon(gpu=gpu, tenants=[tenant]), make_daemon(gpu=gpu)
    with contextlib.ExitStack() as stack:
        receiver = stack.enter_context(transferd.Client(far.socket))
        there, target = on_gpu(receiver, soft)
        grant = granted(target)
        for i in range(16):
            one = stack.enter_context(transferd.Client(near.socket, shared_memory=False))
            plain = one.alloc(4096)  # of a kind that may vanish in mid-flight
            plain.view[:] = bytes([i + 1]) * 4096
            job = one.write(plain, grant.descriptor, i * 4096, imm=1)
            assert job.wait(WAIT_S) is OK
        assert there[: 16 * 4096] == b"".join(bytes([i + 1]) * 4096 for i in range(16))
        sender = stack.enter_context(transferd.Client(near.socket))
        here, source = on_gpu(sender, soft)
        here[:] = bytes(range(256)) * (LENGTH // 256)
        assert sender.write(source, grant.descriptor, imm=1).wait(WAIT_S) is OK
        assert there == here
        assert "no slot left" not in near.log() + far.log()


@pytest.mark.parametrize("side", ["source", "destination"])
def test_memory_that_cannot_be_opened_costs_its_own_jobs_alone(
    soft: SoftCuda, shared_pair: Pair, side: str
) -> None:
    near, far = (daemon.socket for daemon in shared_pair)
    with (
        transferd.Client(near) as sender,
        transferd.Client(far) as receiver,
        transferd.Client(near if side == "source" else far) as careless,
    ):
        opened_badly(soft, sender, receiver, careless, side)


def opened_badly(
    soft: SoftCuda, sender: Client, receiver: Client, careless: Client, side: str
) -> None:
    _, source = on_gpu(sender, soft)
    _, target = on_gpu(receiver, soft)
    grant = granted(target)
    assert sender.write(source, grant.descriptor, imm=9).wait(WAIT_S) is OK
    gone = SoftBuffer(soft, LENGTH)
    lost = careless.register(gone)
    gone.free()  # while it is registered
    for _ in range(5):
        jobs = [sender.write(source, grant.descriptor, imm=9) for _ in range(4)]
        if side == "source":
            bad = careless.write(lost[0:4096], grant.descriptor, imm=10)
        else:
            bad = sender.write(source[0:4096], granted(lost).descriptor, imm=10)
        with pytest.raises(transferd.JobFailed):
            bad.wait(WAIT_S)
        assert {job.wait(WAIT_S) for job in jobs} == {OK}
    receiver.counter(9).wait(21, WAIT_S)
    assert receiver.counter(9).value == 21
