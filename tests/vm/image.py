# SPDX-License-Identifier: Apache-2.0
"""Kernel and initramfs of the guests, built from Debian packages and kept in build/vm.

The kernel is the package that linux-image-amd64 depends on: downloaded, unpacked, never installed.
An image is known by the package's version and by what else it is made of, is whole or not there (it
appears by a rename), and is checked by hash before each use; one that is damaged is built again.

``python tests/vm/image.py`` builds it, or says why there can be none.
"""

from __future__ import annotations

import contextlib
import fcntl
import gzip
import hashlib
import json
import lzma
import os
import platform
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from vm import needs
from vm.errors import Unavailable

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

ROOT = Path(__file__).resolve().parents[2]
CACHE = ROOT / "build" / "vm"
INIT = Path(__file__).with_name("init.sh")
META_PACKAGE = "linux-image-amd64"
DOWNLOAD_S = 600.0
LOCK_S = 900.0  # another builder may be downloading

# In the order in which they are needed; what they depend on comes before them by itself.
MODULES = (
    "virtio_pci",
    "virtio_net",
    "virtio_console",
    "9pnet_virtio",
    "9p",
    "overlay",
    "dummy",
    "veth",
    "rdma_rxe",
    "ib_uverbs",
    "rdma_ucm",
    "rdma_cm",
    "sch_netem",
    "sch_tbf",
)
# rxe refuses each netdev without them, and newer kernels have them built in.
OPTIONAL_MODULES = ("crc32_generic", "crc32_pclmul")
FOLDERS = ("bin", "modules", "proc", "sys", "dev", "host", "overlay", "root")


@dataclass(frozen=True, slots=True)
class Image:
    """What QEMU boots.

    Attributes:
        kernel: The kernel.
        initrd: The initramfs.
    """

    kernel: Path
    initrd: Path


@dataclass(frozen=True, slots=True)
class KernelPackage:
    """A kernel's Debian package.

    Attributes:
        name: As apt knows it.
        version: Of the package, not of the kernel.
    """

    name: str
    version: str

    @property
    def key(self) -> str:
        """A file name that is its own."""
        return f"{self.name}_{self.version}".replace(":", "%3a").replace("/", "_")


def ensure(cache: Path = CACHE) -> Image:
    """Gives an image that is whole, building it if there is none.

    Args:
        cache: Holds images and downloaded packages.

    Raises:
        Unavailable: Something is missing on this machine; the text says what to install.
    """
    require_tools()
    cache.mkdir(parents=True, exist_ok=True)
    with locked(cache / "lock"):
        made_of = recipe()
        package = candidate()
        if package is None:
            image = _newest(cache, made_of)
            if image is None:
                raise Unavailable(
                    f"apt knows no {META_PACKAGE}, which the guests' kernel comes from; guests need"
                    " Debian and its lists of packages: sudo apt-get update"
                )
            return image
        folder = cache / "images" / f"{package.key}_{made_of}"
        image = checked(folder)
        if image is None:
            _build(cache, package, folder)
            image = checked(folder)
            assert image is not None, f"{folder} is damaged right after it was built"
        return image


def require_tools() -> None:
    """Checks that the programs are there that guests need.

    Raises:
        Unavailable: Not all; the text names the packages.
    """
    if platform.machine() != "x86_64":
        raise Unavailable(
            f"guests run this machine's programs on x86-64; it is {platform.machine()}"
        )
    lacking = needs.missing()
    if lacking:
        raise Unavailable(
            f"guests need packages that are missing here: {' '.join(lacking)}\n"
            f"  sudo apt-get install --no-install-recommends {' '.join(lacking)}"
        )


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Keeps other builders out; the lock goes with its process."""
    with path.open("w") as file:
        deadline = time.monotonic() + LOCK_S
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    raise Unavailable(
                        f"another process has built an image for {LOCK_S:g} s ({path})"
                    ) from None
            time.sleep(0.1)  # flock with a bound: there is no call for it
        yield


def recipe() -> str:
    """Hashes what an image is made of beside the kernel."""
    busybox = needs.program("busybox")
    assert busybox is not None
    digest = hashlib.sha256()
    for part in (*MODULES, *OPTIONAL_MODULES, *FOLDERS):
        digest.update(part.encode() + b"\0")
    digest.update(INIT.read_bytes())
    digest.update(Path(busybox).read_bytes())
    return digest.hexdigest()[:12]


def candidate() -> KernelPackage | None:
    """Asks apt for the kernel package of the day; None if it knows none."""
    depends = _output(["apt-cache", "depends", META_PACKAGE])
    names = [line.split()[-1] for line in depends.splitlines() if "Depends:" in line]
    if not names:
        return None
    shown = _output(["apt-cache", "show", "--no-all-versions", names[0]])
    for line in shown.splitlines():
        if line.startswith("Version: "):
            return KernelPackage(names[0], line.removeprefix("Version: ").strip())
    return None


def _output(command: Sequence[str]) -> str:
    """Runs a program that only reads; what it prints, nothing if it fails or is not there."""
    try:
        ended = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
            env={**os.environ, "LC_ALL": "C"},
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return ended.stdout if ended.returncode == 0 else ""


def checked(folder: Path) -> Image | None:
    """Reads an image of the cache; None if it is not there or not what was built."""
    image = Image(folder / "vmlinuz", folder / "initrd.gz")
    try:
        hashes = json.loads((folder / "manifest.json").read_text())
        if hashes == {path.name: _hash(path) for path in (image.kernel, image.initrd)}:
            return image
    except (OSError, ValueError):
        pass
    return None


def _newest(cache: Path, made_of: str) -> Image | None:
    """Finds the image that was built last, for machines whose lists of packages are gone."""
    folders = sorted(cache.glob(f"images/*_{made_of}"), key=lambda folder: folder.stat().st_mtime)
    for folder in reversed(folders):
        image = checked(folder)
        if image is not None:
            return image
    return None


def _hash(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _build(cache: Path, package: KernelPackage, folder: Path) -> None:
    """Builds an image into its folder, and clears away what was there before; under the lock."""
    work = cache / "building"
    shutil.rmtree(work, ignore_errors=True)  # of one that was killed
    image = work / "image"
    image.mkdir(parents=True)
    make(image, work, download(cache / "packages", package))
    hashes = {path.name: _hash(path) for path in sorted(image.iterdir())}
    (image / "manifest.json").write_text(json.dumps(hashes))
    shutil.rmtree(folder, ignore_errors=True)
    folder.parent.mkdir(exist_ok=True)
    image.rename(folder)
    for old in folder.parent.iterdir():
        if old != folder:
            shutil.rmtree(old)
    shutil.rmtree(work)


def make(image: Path, work: Path, package: Path) -> None:
    """Makes vmlinuz and initrd.gz of a kernel package.

    Args:
        image: Folder that gets them.
        work: Folder for what is needed on the way.
        package: The package's file.

    Raises:
        Unavailable: It cannot be done; the text says why.
    """
    unpacked = work / "kernel"
    _run(["dpkg-deb", "-x", str(package), str(unpacked)])
    (kernel,) = (unpacked / "boot").glob("vmlinuz-*")
    shutil.copyfile(kernel, image / "vmlinuz")
    _lay_out(work / "initramfs", unpacked, kernel.name.removeprefix("vmlinuz-"))
    _pack(work / "initramfs", image / "initrd.gz")


def download(packages: Path, package: KernelPackage) -> Path:
    """Fetches the kernel package; apt checks the hash of one that is there."""
    packages.mkdir(parents=True, exist_ok=True)
    wanted = packages / f"{package.key}_amd64.deb"
    for other in packages.iterdir():
        if other != wanted:
            other.unlink()
    _run(["apt-get", "download", f"{package.name}={package.version}"], cwd=packages)
    if not wanted.exists():
        raise Unavailable(f"apt-get download {package.name} left no {wanted.name} in {packages}")
    return wanted


def _lay_out(root: Path, unpacked: Path, release: str) -> None:
    """Makes the tree of the initramfs: busybox, init, and the modules in the order of loading."""
    for name in FOLDERS:
        (root / name).mkdir(parents=True)
    busybox = needs.program("busybox")
    assert busybox is not None
    if b"/ld-linux" in Path(busybox).read_bytes():
        raise Unavailable(
            f"{busybox} needs shared libraries; guests need the static one:\n"
            "  sudo apt-get install --no-install-recommends busybox-static"
        )
    shutil.copy(busybox, root / "bin" / "busybox")
    shutil.copyfile(INIT, root / "init")
    (root / "init").chmod(0o755)
    _run(["depmod", "-b", str(unpacked), release])
    order = [_place(file, root / "modules") for file in _module_files(unpacked, release)]
    (root / "modules" / "order").write_text("".join(f"{name}\n" for name in order))


def _module_files(unpacked: Path, release: str) -> list[Path]:
    """Lists the modules' files, each after those that it depends on."""
    files: dict[Path, None] = {}
    modprobe = needs.program("modprobe")
    assert modprobe is not None
    for name in (*OPTIONAL_MODULES, *MODULES):
        command = [modprobe, "-d", str(unpacked), "-S", release, "--show-depends", name]
        shown = _output(command)
        if not shown and name not in OPTIONAL_MODULES:
            raise Unavailable(f"the kernel {release} has no module {name}")
        for line in shown.splitlines():
            kind, _, file = line.strip().partition(" ")
            if kind == "insmod":
                files[Path(file.split()[0])] = None
    return list(files)


def _place(module: Path, folder: Path) -> str:
    """Copies a module, unpacked as busybox needs it; gives its file's name."""
    if module.suffix == ".xz":
        (folder / module.stem).write_bytes(lzma.decompress(module.read_bytes()))
        return module.stem
    if module.suffix != ".ko":
        raise Unavailable(f"{module.name} is packed in a way that is not known here")
    shutil.copyfile(module, folder / module.name)
    return module.name


def _pack(root: Path, initrd: Path) -> None:
    names = sorted(str(path.relative_to(root)) for path in root.rglob("*"))
    packed = subprocess.run(
        ["cpio", "--create", "--format=newc", "--quiet", "--owner=0:0"],
        input="\n".join([".", *names]).encode(),
        stdout=subprocess.PIPE,
        cwd=root,
        check=True,
    ).stdout
    initrd.write_bytes(gzip.compress(packed, compresslevel=1))


def _run(command: Sequence[str], cwd: Path | None = None) -> None:
    """Runs a step of the build.

    Raises:
        Unavailable: It failed; the text has what it printed.
    """
    program = needs.program(command[0])
    if program is None:
        raise Unavailable(f"guests need {command[0]}, which is missing here")
    try:
        ended = subprocess.run(
            [program, *command[1:]],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=DOWNLOAD_S,
            cwd=cwd,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise Unavailable(f"not within {DOWNLOAD_S:g} s: {' '.join(command)}") from None
    if ended.returncode != 0:
        raise Unavailable(f"failed: {' '.join(command)}\n{ended.stdout[-2000:]}")


if __name__ == "__main__":
    try:
        print(ensure().initrd.parent)
    except Unavailable as error:
        sys.exit(str(error))
