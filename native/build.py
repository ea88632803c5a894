# SPDX-License-Identifier: Apache-2.0
"""Build hooks of setuptools: protobuf code, cffi glue, C sources.

Neither C files nor declarations are listed anywhere else: the sources are found in the tree, and
what cffi reads is made from the headers by the C preprocessor. ``python native/build.py`` builds in
place.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from setuptools import setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.command.sdist import sdist
from setuptools.errors import CompileError

if TYPE_CHECKING:
    from collections.abc import Iterable

NATIVE = Path("native")
INCLUDE = NATIVE / "include"
PROTO = Path("proto")

C_FLAGS = [
    "-std=gnu11",
    "-O2",
    "-g",
    "-fvisibility=hidden",
    "-fno-common",
    "-fstack-protector-strong",
    # A prototype in a header that differs from its definition is only a warning by default.
    "-Werror=incompatible-pointer-types",
    "-Werror=implicit-function-declaration",
    "-Werror=int-conversion",
]
# The glue is compiled with the same flags, so not with -Wmissing-prototypes, which it fails.
STRICT_FLAGS = ["-Wall", "-Wextra", "-Wshadow", "-Wconversion", "-Wformat=2", "-Wvla", "-Werror"]
LINK_FLAGS = ["-Wl,-z,relro,-z,now"]


@dataclass(frozen=True, slots=True)
class Module:
    """A cffi module.

    Attributes:
        name: Full name.
        headers: Headers that Python may call, under native/include.
        sources: Globs of C files, relative to native/.
        needs: Header to probe for, and the package that brings it.
    """

    name: str
    headers: tuple[str, ...]
    sources: tuple[str, ...]
    needs: tuple[tuple[str, str], ...] = ()

    def c_files(self) -> list[str]:
        """Finds its C files, as paths relative to the root of the tree."""
        found = {str(path) for glob in self.sources for path in NATIVE.glob(glob)}
        return sorted(found)


MODULES = {
    module.name: module
    for module in (
        Module(
            name="transferd.native._core",
            headers=("transferd/abi.h", "transferd/core.h", "transferd/names.h"),
            sources=("core/*.c", "providers/**/*.c"),
            needs=(
                ("rdma/fabric.h", "libfabric-dev"),
                ("infiniband/verbs.h", "libibverbs-dev"),
            ),
        ),
        Module(
            name="transferd.native._client",
            headers=(
                "transferd/abi.h",
                "transferd/client.h",
                "transferd/lane.h",
                "transferd/names.h",
            ),
            sources=("shm/*.c", "core/names.c"),
        ),
        Module(
            name="transferd.native._gpu",
            headers=("transferd/gpu.h", "transferd/stage.h"),
            sources=("gpu/*.c", "core/clock.c", "core/error.c"),
        ),
    )
}


def headers() -> list[str]:
    """Finds all C headers: what an extension is rebuilt for, and what an sdist carries."""
    return sorted(str(path) for path in NATIVE.rglob("*.h"))


def protos() -> list[Path]:
    """Finds all proto files."""
    return sorted(PROTO.rglob("*.proto"))


def run_preprocessor(compiler: list[str], text: str, *flags: str) -> str:
    """Preprocesses C text.

    Args:
        compiler: The C compiler's command.
        text: C source.
        flags: More flags for it.

    Returns:
        What the preprocessor printed.

    Raises:
        CompileError: It failed.
    """
    result = subprocess.run(
        [*compiler, "-E", f"-I{INCLUDE}", *flags, "-"],
        input=text,
        capture_output=True,
        text=True,
        check=False,
    )
    if result.returncode != 0:
        raise CompileError(result.stderr.strip())
    return result.stdout


def declarations(compiler: list[str], module: Module) -> str:
    """Makes what cffi reads out of a module's headers.

    Args:
        compiler: The C compiler's command.
        module: The module.

    Returns:
        C declarations with macros expanded, and ``#define NAME ...`` for each number.
    """
    text = "".join(f'#include "{header}"\n' for header in module.headers)
    with tempfile.TemporaryDirectory() as empty_headers:
        # cffi knows these headers' types; the C library's own would bring all of its words along.
        for name in ("stddef.h", "stdint.h"):
            Path(empty_headers, name).touch()
        flags = ["-nostdinc", f"-I{empty_headers}", "-undef"]
        plain = run_preprocessor(compiler, text, "-P", *flags)
        macros = run_preprocessor(compiler, text, "-dM", *flags)
    return number_macros(macros) + plain


def number_macros(macros: str) -> str:
    """Picks the macros that are numbers out of the output of ``cpp -dM``.

    cffi has the compiler compute them, so that expressions work.
    """
    lines = []
    for line in macros.splitlines():
        match = re.fullmatch(r"#define (TFD_\w+) ([-+*/()<>|&~\w ]+)", line)
        if match and re.search(r"\d", match[2]) and "__" not in match[2]:
            lines.append(f"#define {match[1]} ...\n")
    return "".join(sorted(lines))


def generate_protobuf() -> None:
    """Makes the Python code of all proto files, beside them, when one of them is newer.

    Raises:
        CompileError: protoc refused a file.
    """
    sources = protos()
    outputs = [
        path.with_name(path.stem + end)
        for path in sources
        for end in ("_pb2.py", "_pb2.pyi", "_pb2_grpc.py")
    ]
    for path in PROTO.rglob("*_pb2*.py*"):
        if path not in outputs and path.suffix in (".py", ".pyi"):
            path.unlink()  # of a proto file that is gone
    newest = max(path.stat().st_mtime for path in sources)
    if all(path.exists() and path.stat().st_mtime >= newest for path in outputs):
        return
    import grpc_tools  # only builds have it
    from grpc_tools import protoc

    well_known = Path(grpc_tools.__file__).parent / "_proto"
    status = protoc.main(
        [
            "protoc",
            f"-I{PROTO}",
            f"-I{well_known}",
            f"--python_out={PROTO}",
            f"--pyi_out={PROTO}",
            f"--grpc_python_out={PROTO}",
            *(str(path.relative_to(PROTO)) for path in sources),
        ]
    )
    if status != 0:
        raise CompileError("protoc refused a file of proto/")


class BuildPy(build_py):
    """Generates the protobuf code first, and leaves what only builds need out of the wheel."""

    def run(self) -> None:
        """Generates, then builds."""
        generate_protobuf()
        super().run()

    def find_package_modules(self, package: str, package_dir: str) -> list[tuple[str, str, str]]:
        """Lists the modules of a package, but for this one."""
        modules = super().find_package_modules(package, package_dir)  # type: ignore[no-untyped-call]
        return [module for module in modules if module[:2] != ("transferd.native", "build")]

    def get_source_files(self) -> list[str]:
        """Lists what an sdist carries: proto files, not what is made of them."""
        found = super().get_source_files()  # type: ignore[no-untyped-call]
        files = [str(path) for path in found]
        return [path for path in files if "_pb2" not in path] + [str(NATIVE / "build.py")]


class BuildExt(build_ext):
    """Finds the C files and makes the cffi glue."""

    user_options: ClassVar = [*build_ext.user_options, ("only=", None, "build this module only")]

    def initialize_options(self) -> None:
        """Sets the defaults."""
        super().initialize_options()
        self.only: str | None = None

    def finalize_options(self) -> None:
        """Fills in what pyproject.toml leaves empty."""
        super().finalize_options()
        if self.only:
            self.extensions = [ext for ext in self.extensions if ext.name.endswith(self.only)]
        # Both modules at once, unless told otherwise: they share no file that is written.
        self.parallel = self.parallel or len(MODULES)
        limited = not sysconfig.get_config_var("Py_GIL_DISABLED")
        for extension in self.extensions or []:
            module = MODULES[extension.name]
            extension.sources = module.c_files()
            extension.depends = [*headers(), str(NATIVE / "build.py")]
            extension.include_dirs = [str(INCLUDE), str(NATIVE)]
            extension.extra_compile_args = [*C_FLAGS, *extra_flags()]
            extension.extra_link_args = LINK_FLAGS
            extension.libraries = ["dl", "rt", "pthread"]
            extension.py_limited_api = limited
            extension.define_macros = [("_GNU_SOURCE", None)]
            if limited:
                extension.define_macros.append(("Py_LIMITED_API", "0x030b0000"))
            else:
                extension.define_macros.append(("_CFFI_NO_LIMITED_API", None))

    def build_extension(self, ext: Any) -> None:
        """Adds the glue and compiles.

        Raises:
            CompileError: A header or the compiler is missing; the text names the package.
        """
        module = MODULES[ext.name]
        compiler = self.compiler_command()
        probe_headers(compiler, module)
        glue = Path(self.build_temp) / f"{module.name.rpartition('.')[2]}.c"
        emit_glue(compiler, module, glue)
        ext.sources = [*module.c_files(), str(glue)]
        super().build_extension(ext)

    def compiler_command(self) -> list[str]:
        """Tells the C compiler's command.

        Raises:
            CompileError: There is none.
        """
        command = shlex.split(os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc")
        if shutil.which(command[0]) is None:
            command = ["cc"]
        if shutil.which(command[0]) is None:
            raise CompileError(
                "no C compiler was found: install gcc (Debian, Ubuntu: apt install build-essential)"
            )
        return command[:1]


class Sdist(sdist):
    """Adds what a build and the tests need beside the packages."""

    def make_distribution(self) -> None:
        """Adds the trees that have no package, and leaves out what a build makes."""
        self.filelist.extend(sdist_extras())
        self.filelist.exclude_pattern(r"_pb2", is_regex=True)
        self.filelist.sort()
        self.filelist.remove_duplicates()
        super().make_distribution()


def sdist_extras() -> list[str]:
    """Finds the files that belong to the project and to no package."""
    roots = ("native", "proto", "tests", "deploy", ".ci", "client", "daemon")
    skipped = {"__pycache__", "build"}
    found: list[str] = []
    for root in roots:
        for path in sorted(Path(root).rglob("*")):
            made = "_pb2" in path.name or path.suffix in (".so", ".pyc", ".o")
            if path.is_file() and not made and not skipped.intersection(path.parts):
                found.append(str(path))
    return [*found, ".clang-format", ".gitignore"]


def extra_flags() -> list[str]:
    """Tells the flags that the environment asks for: TRANSFERD_WERROR makes warnings errors."""
    flags = [] if sys_flags_have("_FORTIFY_SOURCE") else ["-D_FORTIFY_SOURCE=2"]
    return flags + (STRICT_FLAGS if os.environ.get("TRANSFERD_WERROR") else [])


def sys_flags_have(word: str) -> bool:
    """Tells whether Python's own compiler flags, which come first, contain a word."""
    return word in str(sysconfig.get_config_var("CFLAGS"))


def probe_headers(compiler: list[str], module: Module) -> None:
    """Checks that the headers a module is compiled against are there.

    Raises:
        CompileError: One is missing; the text says which package brings it.
    """
    for header, package in module.needs:
        try:
            run_preprocessor(compiler, f"#include <{header}>\n")
        except CompileError as error:
            raise CompileError(
                f"the header {header} was not found; install {package} "
                f"(Debian, Ubuntu: apt install {package})"
            ) from error


def emit_glue(compiler: list[str], module: Module, path: Path) -> None:
    """Writes a module's cffi glue.

    Args:
        compiler: The C compiler's command.
        module: The module.
        path: Where to write it; kept as it is when nothing changed.
    """
    from cffi import FFI  # only builds and the modules themselves need it

    ffi = FFI()
    ffi.cdef(declarations(compiler, module))
    includes: Iterable[str] = (f'#include "{header}"\n' for header in module.headers)
    ffi.set_source(module.name, "".join(includes))
    path.parent.mkdir(parents=True, exist_ok=True)
    ffi.emit_c_code(str(path))


def main() -> None:
    """Builds in place, for a tree that is installed with ``pip install -e``.

    Each module by itself, so that one which does not compile does not hold up the other.
    """
    os.chdir(Path(__file__).resolve().parent.parent)
    warnings.filterwarnings("ignore", message=".*experimental")
    generate_protobuf()
    failed = False
    for name in MODULES:
        short = name.rpartition(".")[2]
        try:
            setup(script_args=["-q", "build_ext", "--inplace", f"--only={short}", *sys.argv[1:]])
        except SystemExit as error:
            print(error, file=sys.stderr)
            failed = True
    sys.exit(failed)


if __name__ == "__main__":
    main()
