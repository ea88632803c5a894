# SPDX-License-Identifier: Apache-2.0
"""CUDA C++ sources: they compile, for several devices, and what is kept of it is ours."""

from __future__ import annotations

import ctypes
import re
import stat
from typing import TYPE_CHECKING

import pytest

from transferd.client import errors
from transferd.client.cuda import modules, nvrtc

from support import tree

if TYPE_CHECKING:
    from pathlib import Path

HEADER = tree.ROOT / "native" / "include" / "transferd" / "device.cuh"
USE = b"""
using namespace transferd;
extern "C" __global__ void use(word *watcher, const word *gate, word target, word *out)
{
    if (is_faulted(wait(gate, target)))
        *out = read(gate);
    bump(watcher);
    bump(watcher, 2);
}
"""


@pytest.fixture
def compiler() -> nvrtc.Nvrtc:
    try:
        return nvrtc.Nvrtc()
    except errors.Unavailable as error:
        pytest.skip(str(error))


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return nvrtc.cache_folder()


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100"])
def test_the_kernels_compile(compiler: nvrtc.Nvrtc, arch: str) -> None:
    image = compiler.compile(nvrtc.SOURCE.read_bytes(), arch)
    assert image.startswith(b"\x7fELF")
    for name in modules.Kernels._fields:
        assert f"tfd_{name}".encode() in image


@pytest.mark.slow
def test_the_header_compiles_by_itself(compiler: nvrtc.Nvrtc) -> None:
    assert compiler.compile(HEADER.read_bytes() + USE, "sm_90").startswith(b"\x7fELF")


def test_a_fault_is_what_the_abi_says() -> None:
    abi = (HEADER.parent / "abi.h").read_text()
    (of_abi,) = re.findall(r"#define TFD_GATE_FAULT \((.*?)\)", abi)
    assert f"gate_fault = {of_abi};" in HEADER.read_text()


@pytest.mark.slow
def test_a_source_that_is_wrong_is_told(compiler: nvrtc.Nvrtc) -> None:
    with pytest.raises(errors.Internal, match=r"sm_90.*COMPILATION(.|\n)*nonsense"):
        compiler.compile(b"nonsense", "sm_90")


class Compiler:
    """Counts what is compiled."""

    count = 0

    def compile(self, source: bytes, arch: str) -> bytes:
        type(self).count += 1
        return b"\x7fELF" + arch.encode()


def test_compiled_once_for_each_device_and_driver(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nvrtc, "Nvrtc", Compiler)
    monkeypatch.setattr(Compiler, "count", 0)
    for _ in range(2):
        assert nvrtc.cubin((9, 0), 13_000) == b"\x7fELFsm_90"
    assert Compiler.count == 1
    (kept,) = cache.iterdir()
    assert stat.S_IMODE(kept.stat().st_mode) == 0o600
    assert stat.S_IMODE(cache.stat().st_mode) & 0o077 == 0
    nvrtc.cubin((8, 0), 13_000)
    nvrtc.cubin((9, 0), 13_010)
    assert Compiler.count == 3


@pytest.mark.parametrize("harm", ["writable", "cut"])
def test_what_others_could_have_written_is_not_loaded(
    cache: Path, monkeypatch: pytest.MonkeyPatch, harm: str
) -> None:
    monkeypatch.setattr(nvrtc, "Nvrtc", Compiler)
    monkeypatch.setattr(Compiler, "count", 0)
    nvrtc.cubin((9, 0), 13_000)
    (kept,) = cache.iterdir()
    if harm == "writable":
        kept.chmod(0o666)
    else:
        kept.write_bytes(b"")
    assert nvrtc.cubin((9, 0), 13_000) == b"\x7fELFsm_90"
    assert Compiler.count == 2


def test_a_folder_that_cannot_be_written_is_no_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/self/nothing")
    monkeypatch.setattr(nvrtc, "Nvrtc", Compiler)
    assert nvrtc.cubin((9, 0), 13_000) == b"\x7fELFsm_90"


def test_without_nvrtc_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(name: str) -> None:
        raise OSError(name)

    monkeypatch.setattr(ctypes, "CDLL", none)
    with pytest.raises(errors.Unavailable, match=r"transferd\[gpu\]"):
        nvrtc.Nvrtc()
