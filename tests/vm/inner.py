# SPDX-License-Identifier: Apache-2.0
"""Tests that run in a guest, and what became of each of them."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING
from xml.etree import ElementTree

from vm.errors import VmError
from vm.guest import SHARE
from vm.image import ROOT

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from vm.guest import Guest

PROGRAMS = ROOT / "build" / "native" / "gcc" / "tests"
PYTEST_S = 400.0
PROGRAM_S = 300.0
BUILD_S = 600.0


class InnerFailure(AssertionError):
    """Tests in a guest failed, or none ran; the text is theirs."""


@dataclass(frozen=True, slots=True)
class Inner:
    """A test that ran in a guest.

    Attributes:
        name: Class and name, as in the report.
        outcome: "passed", "failed" or "skipped".
        text: Why it failed or was skipped.
    """

    name: str
    outcome: str
    text: str = ""


def build_programs() -> None:
    """Builds the C programs on the host; before a guest boots, which may not see later changes.

    Raises:
        VmError: They cannot be built; the text has what make printed.
    """
    made = subprocess.run(
        [
            "make",
            "-s",
            "-C",
            str(ROOT / "native"),
            f"-j{os.cpu_count() or 1}",
            "all",
            "conformance",
        ],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=BUILD_S,
        check=False,
    )
    if made.returncode != 0:
        raise VmError(f"the C tests cannot be built\n{made.stdout[-4000:]}")


def run_program(
    guest: Guest,
    name: str,
    *arguments: str,
    env: Mapping[str, str] | None = None,
    timeout_s: float = PROGRAM_S,
) -> str:
    """Runs a C test ("core_write" is native/tests/test_core_write.c) in a guest.

    Args:
        guest: Where.
        name: Which.
        arguments: Of the program.
        env: Added to the guest's environment: TFD_TEST_PROVIDER, TFD_TEST_RAIL, …
        timeout_s: Bound.

    Returns:
        What it printed.

    Raises:
        InnerFailure: It failed.
        CommandTimeout: It was not done in time.
    """
    finished = guest.run(
        [str(PROGRAMS / f"test_{name}"), *arguments], env=env, timeout_s=timeout_s, check=False
    )
    text = finished.stdout + finished.stderr
    if finished.status != 0:
        raise InnerFailure(f"test_{name} in {guest.name}: status {finished.status}\n{text[-8000:]}")
    return text


def run_pytest(
    guest: Guest,
    *selection: str,
    env: Mapping[str, str] | None = None,
    timeout_s: float = PYTEST_S,
    cwd: Path = ROOT,
) -> list[Inner]:
    """Runs a selection of the tests in a guest: the tree and the environment of the host.

    Args:
        guest: Where.
        selection: Arguments of pytest.
        env: Added to the guest's environment.
        timeout_s: Bound on the whole run.
        cwd: Folder to run in.

    Returns:
        What became of each; at least one passed and none failed.

    Raises:
        InnerFailure: A test failed, none ran, or pytest itself failed; the text is pytest's.
        CommandTimeout: The run was not done in time.
    """
    report = guest.share / "junit.xml"
    report.unlink(missing_ok=True)
    process = guest.spawn(
        [
            *(sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-q"),
            *("-o", f"timeout={timeout_s:g}", "-o", "faulthandler_timeout=0"),
            f"--junitxml={SHARE}/junit.xml",
            *selection,
        ],
        env={"PYTHONSAFEPATH": "1", "PYTHONDONTWRITEBYTECODE": "1", **(env or {})},
        cwd=cwd,
    )
    status = process.wait(timeout_s).status
    tests = outcomes(report.read_text()) if report.exists() else []
    failed = [test for test in tests if test.outcome == "failed"]
    if status == 0 and not failed and any(test.outcome == "passed" for test in tests):
        return tests
    raise InnerFailure(describe(guest, tests, failed, status, process.text()))


def outcomes(junit: str) -> list[Inner]:
    """Reads pytest's JUnit report."""
    found = []
    for case in ElementTree.fromstring(junit).iter("testcase"):
        name = f"{case.get('classname')}::{case.get('name')}"
        outcome, text = "passed", ""
        for child in case:
            if child.tag in ("failure", "error"):
                outcome, text = "failed", child.text or child.get("message") or ""
            elif child.tag == "skipped" and outcome == "passed":
                outcome, text = "skipped", child.get("message") or ""
        found.append(Inner(name, outcome, text))
    return found


def describe(
    guest: Guest, tests: Sequence[Inner], failed: Sequence[Inner], status: int, text: str
) -> str:
    """Writes down what went wrong in a guest's pytest."""
    if failed:
        parts = [f"{len(failed)} of {len(tests)} tests failed in {guest.name}"]
        parts += [f"--- {test.name}\n{test.text[-6000:]}" for test in failed]
        return "\n".join(parts)
    skipped = "".join(f"\n  skipped: {test.name}: {test.text}" for test in tests)
    return f"no test passed in {guest.name}, status {status}{skipped}\n{text[-6000:]}"
