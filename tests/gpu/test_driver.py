# SPDX-License-Identifier: Apache-2.0
"""Which calls of the real driver wait while a stream waits for a word (client/cuda/README.md)."""

from __future__ import annotations

import functools
import mmap
import threading
from ctypes import addressof, c_char, c_uint64
from typing import TYPE_CHECKING, Any

import pytest

from transferd.client.cuda import flush, nvrtc
from transferd.client.cuda.driver import CudaError

from support.gpu import TEST_WAIT_S

if TYPE_CHECKING:
    from collections.abc import Callable

    from support.gpu import Gpu

pytestmark = [pytest.mark.gpu, pytest.mark.slow]

LOOK_S = 1.0
HOST_BYTES = 4 << 20
KERNEL = b'extern "C" __global__ void nothing() {}'


def waits(gpu: Gpu, call: Callable[[], Any]) -> bool:
    """Makes a call while a stream waits, in a thread; tells whether it waits, too."""
    word = c_uint64.from_address(gpu.pinned(8).address)
    word.value = 0
    stream = gpu.stream()
    gpu.driver.wait_value(stream, addressof(word), 1)
    assert not gpu.done(stream)
    failures: list[Exception] = []

    def run() -> None:
        try:
            with gpu.driver.entered(gpu.context):
                call()
        except Exception as error:
            failures.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(LOOK_S)
    waited = thread.is_alive()
    word.value = 1
    thread.join(TEST_WAIT_S)
    gpu.wait(stream)
    assert not thread.is_alive(), "it goes on with the stream"
    assert not failures
    return waited


def host_memory() -> tuple[mmap.mmap, int]:
    memory = mmap.mmap(-1, HOST_BYTES)
    return memory, addressof(c_char.from_buffer(memory))


def test_loading_a_module_waits(gpu: Gpu) -> None:
    major, minor = gpu.driver.capability(gpu.device)
    image = nvrtc.Nvrtc().compile(KERNEL, f"sm_{major}{minor}")
    assert waits(gpu, lambda: gpu.driver.module_load(image))


def test_unregistering_host_memory_waits_and_registering_does_not(gpu: Gpu) -> None:
    memory, address = host_memory()
    assert not waits(gpu, lambda: gpu.driver.host_register(address, len(memory)))
    assert waits(gpu, lambda: gpu.driver.host_unregister(address))


def test_what_jobs_need_does_not_wait(gpu: Gpu) -> None:
    function = gpu.kernel(KERNEL, "nothing")
    made: list[int] = []
    assert not waits(gpu, lambda: made.append(gpu.driver.stream_create()))
    assert not waits(gpu, lambda: gpu.driver.launch(function, made[0], []))
    assert not waits(gpu, lambda: gpu.driver.stream_result(made[0]))
    assert not waits(gpu, functools.partial(gpu.driver.stream_destroy, made[0]))


def test_allocating_does_not_wait(gpu: Gpu) -> None:
    assert not waits(gpu, lambda: gpu.malloc(HOST_BYTES))


def test_flushes_as_its_attributes_say(gpu: Gpu) -> None:
    """What comes between a NIC's writes and work on them: client/cuda/flush.py relies on it."""
    ordering, options = gpu.driver.flush_needs(gpu.device)
    print("WRITES_ORDERING", ordering, "FLUSH_WRITES_OPTIONS", options)
    need = flush.need_of(gpu.driver, gpu.device)
    assert need is not flush.Need.IMPOSSIBLE
    if options & flush.OPTION_HOST:
        gpu.driver.flush_writes()
    word = gpu.pinned(8)
    c_uint64.from_address(word.address).value = 5
    stream = gpu.stream()
    if options & flush.OPTION_MEMOPS:
        gpu.driver.wait_value(stream, word.address, 5, flush=True)
    else:
        with pytest.raises(CudaError, match="801"):
            gpu.driver.wait_value(stream, word.address, 5, flush=True)
    gpu.driver.wait_value(stream, word.address, 5)  # nothing of it stays
    gpu.wait(stream)
