# SPDX-License-Identifier: Apache-2.0
"""GPU memory whose helper takes its time: who needs it waits, and nobody else."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

import transferd
from transferd import JobStatus

from support.softcuda import MIB, SoftBuffer
from support.staged import gpu_config, gpus, soft_driver
from support.waiting import WAIT_S, eventually

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from conftest import MakeDaemon

    from support.softcuda import SoftCuda

pytestmark = pytest.mark.slow

OTHERS = 8


@pytest.fixture
def soft() -> Iterator[SoftCuda]:
    with soft_driver() as made:
        yield made


@pytest.mark.parametrize("side", ["source", "destination"])
def test_others_go_on_while_a_helper_starts(
    soft: SoftCuda, make_daemon: MakeDaemon, tmp_path: Path, side: str
) -> None:
    library = tmp_path / "libcuda.so.1"
    os.mkfifo(library)  # whoever loads it waits until somebody writes to it
    near = make_daemon(gpu=gpu_config(str(library) if side == "source" else ""))
    far = make_daemon(gpu=gpu_config(str(library) if side == "destination" else ""))
    slow = near if side == "source" else far
    with (
        transferd.Client(near.socket, name="other") as other,
        transferd.Client(near.socket, name="waiting") as waiting,
        transferd.Client(far.socket) as receiver,
    ):
        host, device = receiver.alloc(MIB), receiver.register(SoftBuffer(soft, MIB))
        plain, on_gpu = (
            region.grant(rights={"write"}, imms=range(8)).descriptor for region in (host, device)
        )
        if side == "source":  # its own is in no GPU's memory, the destination is open
            source, target = other.alloc(MIB), on_gpu
            stuck, there = waiting.register(SoftBuffer(soft, MIB)), plain
        else:
            source, target = other.register(SoftBuffer(soft, MIB)), plain
            stuck, there = waiting.alloc(MIB), on_gpu
        job = other.write(source[0:4096], target, imm=1)
        assert job.wait(WAIT_S) is JobStatus.OK
        late = [waiting.write(stuck, there, imm=2) for _ in range(4)]
        eventually(lambda: [g.state for g in gpus(slow)] == ["STARTING"], "a helper that starts")
        for _ in range(OTHERS):
            job = other.write(source[0:4096], target, imm=1)
            assert job.wait(WAIT_S) is JobStatus.OK
            assert "staged" in str(job.path)
        assert [job.result for job in late] == [None] * 4
        assert [g.state for g in gpus(slow)] == ["STARTING"]
        with library.open("wb"):
            pass  # it is no library: the helper ends
        for job in late:
            with pytest.raises(transferd.JobFailed) as caught:
                job.wait(WAIT_S)
            assert caught.value.detail == "STAGING"
        receiver.counter(1).wait(OTHERS + 1, WAIT_S)
        assert (receiver.counter(1).value, receiver.counter(2).value) == (OTHERS + 1, 0)
