# SPDX-License-Identifier: Apache-2.0
"""What pytest collects here is all of it: nothing that is for a provider has vanished."""

from __future__ import annotations

import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest

from support.providers import CASES, OPERATIONS, PROGRAMS, PROVIDERS
from support.tree import ROOT

HERE = Path(__file__).parent
GUESTS = ROOT / "tests" / "vm" / "test_core.py"
IN_GUESTS = re.compile(r"tests/vm/test_core\.py::test_core\[(.*)\]")
ID = re.compile(r"tests/conformance/(?P<module>\w+)\.py::(?P<test>\w+)\[(?P<parameters>.*)\]")


@pytest.fixture(scope="module")
def lines() -> list[str]:
    """Gives the names of all that is collected here, and of the core's programs in guests."""
    listed = subprocess.run(
        [sys.executable, "-m", "pytest", "--collect-only", "-q", HERE, GUESTS],
        check=True,
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    return listed.stdout.splitlines()


@pytest.fixture(scope="module")
def collected(lines: list[str]) -> dict[tuple[str, str], set[str]]:
    """Gives, for each module and provider, what is collected: the test and its other parameters."""
    found: dict[tuple[str, str], set[str]] = defaultdict(set)
    names = sorted((one.name for one in PROVIDERS), key=len, reverse=True)
    for line in lines:
        if (match := ID.fullmatch(line)) is None:
            continue
        of = next((n for n in names if f"{match['parameters']}-".startswith(f"{n}-")), None)
        if of is not None:
            rest = match["parameters"].removeprefix(of).removeprefix("-")
            found[match["module"], of].add(f"{match['test']}[{rest}]")
    return found


def test_every_case_and_program(collected: dict[tuple[str, str], set[str]]) -> None:
    for module, test, names in (
        ("test_provider", "test_case", CASES),
        ("test_core", "test_core", PROGRAMS),
    ):
        for one in PROVIDERS:
            there = {each for each in collected[module, one.name] if each.startswith(f"{test}[")}
            wanted = [] if one.missing() else [name for name in names if name not in one.left_out]
            assert there == {f"{test}[{name}]" for name in wanted}, (module, one.name)


def test_programs_in_guests_are_not_taken_out_here(lines: list[str]) -> None:
    """They are of providers that this host may have no device for: the guest has one."""
    there = {match[1] for line in lines if (match := IN_GUESTS.fullmatch(line))}
    for one in PROVIDERS:
        if one.missing() and one.name in ("verbs", "libfabric-verbs"):
            runs = {name for name in PROGRAMS if name not in {**one.known, **one.left_out}}
            assert {f"{one.name}-{name}" for name in runs} <= there


def test_every_operation(collected: dict[tuple[str, str], set[str]]) -> None:
    """Each of the providers has the same ones, and together they are the module's tests."""
    source = (HERE / "test_operations.py").read_text()
    functions = set(re.findall(r"^def (test_\w+)", source, re.MULTILINE))
    whole = set().union(
        *(of for (module, _), of in collected.items() if module == "test_operations")
    )
    assert {each.partition("[")[0] for each in whole} == functions
    for one in PROVIDERS:
        runs = one.missing() is None and OPERATIONS not in one.left_out
        assert collected["test_operations", one.name] == (whole if runs else set()), one.name


def test_every_provider_says_what_it_leaves_out(
    collected: dict[tuple[str, str], set[str]],
) -> None:
    for one in PROVIDERS:
        assert "test_left_out[]" in collected["test_provider", one.name]
        assert one.left_out.keys() <= {*CASES, *PROGRAMS, OPERATIONS}, one.name
        assert all(one.left_out.values()), one.name
