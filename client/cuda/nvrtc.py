# SPDX-License-Identifier: Apache-2.0
"""The kernels' source in the package, compiled by NVRTC on first use and kept for each user."""

from __future__ import annotations

import contextlib
import ctypes
import glob
import hashlib
import os
import sys
import tempfile
from ctypes import byref, c_char_p, c_int, c_size_t, c_void_p
from pathlib import Path
from typing import Any

from transferd.client import errors

SOURCE = Path(__file__).with_name("kernels") / "pages.cu"
_NAMES = ("libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so")
_ELF = b"\x7fELF"


class Nvrtc:
    """NVRTC's calls that we use."""

    def __init__(self) -> None:
        """Loads the library.

        Raises:
            Unavailable: NO_NVRTC.
        """
        self._library = _find()

    def version(self) -> tuple[int, int]:
        """Tells its version."""
        major, minor = c_int(), c_int()
        self._library.nvrtcVersion(byref(major), byref(minor))
        return major.value, minor.value

    def compile(self, source: bytes, arch: str) -> bytes:
        """Compiles a source.

        Args:
            source: CUDA C++.
            arch: As "sm_90".

        Returns:
            A cubin.
        """
        program = c_void_p()
        self._check(
            "nvrtcCreateProgram",
            self._library.nvrtcCreateProgram(
                byref(program), c_char_p(source), c_char_p(b"pages.cu"), 0, None, None
            ),
        )
        try:
            options = (c_char_p * 2)(f"--gpu-architecture={arch}".encode(), b"--std=c++17")
            result = self._library.nvrtcCompileProgram(program, len(options), options)
            if result:
                log = self._text(program, "nvrtcGetProgramLogSize", "nvrtcGetProgramLog")
                raise self._error(
                    f"nvrtcCompileProgram for {arch}",
                    result,
                    f": {log.rstrip(chr(0).encode()).decode(errors='replace')}",
                )
            return self._text(program, "nvrtcGetCUBINSize", "nvrtcGetCUBIN")
        finally:
            self._library.nvrtcDestroyProgram(byref(program))

    def _text(self, program: c_void_p, size_call: str, call: str) -> bytes:
        size = c_size_t()
        self._check(size_call, getattr(self._library, size_call)(program, byref(size)))
        out = ctypes.create_string_buffer(size.value)
        self._check(call, getattr(self._library, call)(program, out))
        return out.raw

    def _check(self, call: str, result: int) -> None:
        if result:
            raise self._error(call, result, "")

    def _error(self, call: str, result: int, more: str) -> errors.Internal:
        self._library.nvrtcGetErrorString.restype = c_char_p
        word = self._library.nvrtcGetErrorString(result) or b"an unknown error"
        return errors.Internal(f"{call} failed with {word.decode()} ({result}){more}")


def _find() -> Any:
    with contextlib.suppress(Exception):  # of pathfinder's own: it is not there, or finds nothing
        from cuda.pathfinder import load_nvidia_dynamic_lib

        found = load_nvidia_dynamic_lib("nvrtc").abs_path
        if found is not None:
            return ctypes.CDLL(found)
    for name in (*_NAMES, *_beside_others()):
        with contextlib.suppress(OSError):
            return ctypes.CDLL(name)
    raise errors.Unavailable(
        "the kernels that copy pages are compiled by NVRTC, which is not installed: "
        "pip install 'transferd[gpu]'",
        reason="NO_NVRTC",
    )


def _beside_others() -> list[str]:
    """Finds what a toolkit, or a wheel that torch has brought, holds."""
    toolkit = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    folders = [f"{toolkit}/lib64", *(f"{entry}/nvidia/*/lib" for entry in sys.path if entry)]
    return [path for folder in folders for path in sorted(glob.glob(f"{folder}/libnvrtc.so.1[23]"))]


def cache_folder() -> Path:
    """Tells where this user's cubins are kept."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(base) / "transferd" / "cuda"


def cubin(capability: tuple[int, int], driver_version: int) -> bytes:
    """Gives the kernels for a device, from the cache where they are there.

    Args:
        capability: Of the device, as (9, 0).
        driver_version: Of the CUDA driver, as 13000.

    Raises:
        Unavailable: NO_NVRTC.
        Internal: NVRTC refused the source.
    """
    source = SOURCE.read_bytes()
    arch = f"sm_{capability[0]}{capability[1]}"
    key = hashlib.sha256(source + f"\0{arch}\0{driver_version}".encode()).hexdigest()
    path = cache_folder() / f"{key}.cubin"
    kept = _read(path)
    if kept is not None:
        return kept
    made = Nvrtc().compile(source, arch)
    with contextlib.suppress(OSError):  # a cache that cannot be written is none
        _write(path, made)
    return made


def _read(path: Path) -> bytes | None:
    """Reads a kept cubin, if it is ours alone: code that others could write is not loaded."""
    try:
        with open(path, "rb") as file:
            about = os.fstat(file.fileno())
            if about.st_uid != os.geteuid() or about.st_mode & 0o022:
                return None
            image = file.read()
    except OSError:
        return None
    return image if image.startswith(_ELF) else None


def _write(path: Path, image: bytes) -> None:
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    fd, name = tempfile.mkstemp(dir=path.parent)  # mode 0600
    try:
        with os.fdopen(fd, "wb") as file:
            file.write(image)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise
