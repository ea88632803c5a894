# SPDX-License-Identifier: Apache-2.0
"""Builds the C programs of the benchmarks when they are wanted, into build/bench."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

BENCH = Path(__file__).resolve().parent
ROOT = BENCH.parents[1]
OUT = ROOT / "build" / "bench"
FLAGS = ("-std=gnu11", "-O2", "-g", "-D_GNU_SOURCE", "-Wall", "-Wextra", "-Werror")


def compile_c(target: str, sources: Sequence[Path], *flags: str) -> Path:
    """Compiles unless the result is newer than all sources.

    Args:
        target: File name of the result.
        sources: C files; headers beside them count as sources for the age.
        flags: Further flags, of the linker too.

    Returns:
        Path of the result.

    Raises:
        subprocess.CalledProcessError: The compiler refused; it has said why.
    """
    OUT.mkdir(parents=True, exist_ok=True)
    path = OUT / target
    headers = [header for source in sources for header in source.parent.glob("*.h")]
    newest = max(file.stat().st_mtime for file in [*sources, *headers])
    if not path.exists() or path.stat().st_mtime < newest:
        compiler = os.environ.get("CC", "cc")
        files = [str(source) for source in sources]
        subprocess.run([compiler, *FLAGS, *files, "-o", str(path), *flags], check=True)
    return path


def fi_raw() -> Path:
    """Builds the raw baseline."""
    return compile_c("fi_raw", [BENCH / "raw" / "fabric.c", BENCH / "raw" / "fi_raw.c"], "-ldl")


def pack_loop() -> Path:
    """Builds the bare loops over a socket."""
    return compile_c("pack_loop", [BENCH / "raw" / "pack_loop.c"])


def ping() -> Path:
    """Builds the C ping-pong."""
    return _with_client_half("ping")


def armed() -> Path:
    """Builds what bumps watchers."""
    return _with_client_half("armed")


def _with_client_half(name: str) -> Path:
    """Builds a program with the client half of the data plane, as a library."""
    native = ROOT / "native"
    sources = [BENCH / "native" / f"{name}.c", *sorted((native / "shm").glob("*.c"))]
    include = (f"-I{native / 'include'}", f"-I{native}")
    return compile_c(
        f"{name}.so", sources, *include, "-shared", "-fPIC", "-fvisibility=hidden", "-pthread"
    )


def worker_cost() -> Path:
    """Builds the program that measures the worker."""
    return with_core("worker_cost")


def verbs_cost() -> Path:
    """Builds the program that measures posting through verbs."""
    return with_core("verbs_cost")


def softverbs() -> Path:
    """Builds the double of libibverbs (native/tests/softverbs)."""
    native = ROOT / "native"
    sources = sorted((native / "tests" / "softverbs").glob("*.c"))
    include = (f"-I{native / 'include'}", f"-I{native}")
    return compile_c(
        "libsoftverbs.so",
        sources,
        *include,
        "-shared",
        "-fPIC",
        "-fvisibility=hidden",
        "-pthread",
        "-Wl,-z,nodelete",
    )


def urgent() -> Path:
    """Builds the program that measures urgent writes beside bulk on a simulated rail."""
    return with_core("urgent")


def verbs_provider() -> Path:
    """Builds the program that uses provider verbs without daemons."""
    return with_core("verbs_provider")


def with_core(name: str) -> Path:
    """Builds a program with all of the data plane."""
    native = ROOT / "native"
    sources = [
        BENCH / "native" / f"{name}.c",
        *sorted((native / "core").glob("*.c")),
        *sorted((native / "providers").glob("*/*.c")),
    ]
    include = (f"-I{native / 'include'}", f"-I{native}", f"-I{native / 'tests'}")
    hardening = ("-fstack-protector-strong", "-fvisibility=hidden")
    libraries = ("-pthread", "-ldl", "-lrt", "-lm")
    (OUT / name).unlink(missing_ok=True)  # some of its headers are not beside the sources
    return compile_c(name, sources, *include, *hardening, *libraries)


def copy() -> Path:
    """Builds one thread's memcpy, as a library."""
    return compile_c(
        "copy.so",
        [BENCH / "native" / "copy.c"],
        "-shared",
        "-fPIC",
        "-fvisibility=hidden",
        "-fno-builtin-memcpy",
    )
