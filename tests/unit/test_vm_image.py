# SPDX-License-Identifier: Apache-2.0
"""What guests boot: told when it cannot be, built once, built again when it is damaged."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import pytest

from vm import image, inner, needs
from vm.errors import Unavailable
from vm.image import Image, KernelPackage

if TYPE_CHECKING:
    from pathlib import Path


class Builds:
    """Stands for apt and the kernel: packages of any version, images of a few bytes."""

    def __init__(self) -> None:
        self.version: str | None = "6.1-1"
        self.made: list[str] = []
        self.fail = False

    def candidate(self) -> KernelPackage | None:
        return None if self.version is None else KernelPackage("linux-image-x", self.version)

    def download(self, packages: Path, package: KernelPackage) -> Path:
        return packages / package.version

    def make(self, folder: Path, work: Path, package: Path) -> None:
        (folder / "vmlinuz").write_text(f"kernel {package.name}")
        if self.fail:
            raise Unavailable("no space is left")
        (folder / "initrd.gz").write_text("initrd")
        self.made.append(package.name)


@pytest.fixture
def builds(monkeypatch: pytest.MonkeyPatch) -> Builds:
    """Replaces what makes images."""
    made = Builds()
    monkeypatch.setattr(image, "candidate", made.candidate)
    monkeypatch.setattr(image, "download", made.download)
    monkeypatch.setattr(image, "make", made.make)
    monkeypatch.setattr(image, "require_tools", lambda: None)
    monkeypatch.setattr(image, "recipe", lambda: "recipe")
    return made


def whole(built: Image) -> bool:
    return built.kernel.exists() and built.initrd.read_text() == "initrd"


def test_missing_programs_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(needs, "SYSTEM_PATH", str(tmp_path))
    with pytest.raises(Unavailable, match=r"apt-get install .*busybox-static.* qemu-system-x86"):
        image.ensure(tmp_path)


def test_other_processors_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    with pytest.raises(Unavailable, match="x86-64; it is aarch64"):
        image.require_tools()


def test_an_image_is_built_once(tmp_path: Path, builds: Builds) -> None:
    first = image.ensure(tmp_path)
    assert whole(first)
    assert image.ensure(tmp_path) == first
    assert builds.made == ["6.1-1"]


@pytest.mark.parametrize("name", ["vmlinuz", "initrd.gz", "manifest.json"])
@pytest.mark.parametrize("damage", ["cut", "changed", "gone"])
def test_a_damaged_image_is_built_again(
    tmp_path: Path, builds: Builds, name: str, damage: str
) -> None:
    file = image.ensure(tmp_path).kernel.parent / name
    if damage == "gone":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:-1] + (b"x" if damage == "changed" else b""))
    assert whole(image.ensure(tmp_path))
    assert len(builds.made) == 2


def test_a_build_that_failed_leaves_no_image(tmp_path: Path, builds: Builds) -> None:
    builds.fail = True
    with pytest.raises(Unavailable, match="no space is left"):
        image.ensure(tmp_path)
    builds.fail = False
    assert whole(image.ensure(tmp_path))


def test_a_new_kernel_replaces_the_old_one(tmp_path: Path, builds: Builds) -> None:
    old = image.ensure(tmp_path)
    builds.version = "6.1-2"
    new = image.ensure(tmp_path)
    assert new != old
    assert whole(new)
    assert not old.kernel.exists()


def test_a_failing_update_keeps_the_old_one(tmp_path: Path, builds: Builds) -> None:
    old = image.ensure(tmp_path)
    builds.version, builds.fail = "6.1-2", True
    with pytest.raises(Unavailable):
        image.ensure(tmp_path)
    builds.version = "6.1-1"
    assert image.ensure(tmp_path) == old


def test_without_lists_of_packages(tmp_path: Path, builds: Builds) -> None:
    builds.version = None
    with pytest.raises(Unavailable, match="apt-get update"):
        image.ensure(tmp_path)
    builds.version = "6.1-1"
    old = image.ensure(tmp_path)
    builds.version = None
    assert image.ensure(tmp_path) == old


def test_builders_take_turns(tmp_path: Path, builds: Builds) -> None:
    got: list[Image] = []
    threads = [
        threading.Thread(target=lambda: got.append(image.ensure(tmp_path))) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(got) == 4
    assert len(set(got)) == 1
    assert builds.made == ["6.1-1"]


def test_a_builder_is_not_waited_for_for_ever(
    tmp_path: Path, builds: Builds, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(image, "LOCK_S", 0.0)
    with image.locked(tmp_path / "lock"), pytest.raises(Unavailable, match="another process"):
        image.ensure(tmp_path)
    assert whole(image.ensure(tmp_path))
    assert builds.made


def test_outcomes_of_a_report() -> None:
    tests = inner.outcomes(
        "<testsuites><testsuite>"
        '<testcase classname="a" name="good"/>'
        '<testcase classname="a" name="bad"><failure message="m">why</failure></testcase>'
        '<testcase classname="a" name="error"><error message="in its set-up"/></testcase>'
        '<testcase classname="a" name="left"><skipped message="no device"/></testcase>'
        "</testsuite></testsuites>"
    )
    assert [(test.outcome, test.text) for test in tests] == [
        ("passed", ""),
        ("failed", "why"),
        ("failed", "in its set-up"),
        ("skipped", "no device"),
    ]
