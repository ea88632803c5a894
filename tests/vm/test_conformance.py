# SPDX-License-Identifier: Apache-2.0
"""The cases that every provider has to pass, on a soft-RoCE device (tests/conformance)."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest

from support.providers import CASES, NATIVE, PROVIDERS
from support.tree import ROOT
from vm import inner

if TYPE_CHECKING:
    from support.providers import Provider
    from vm.guest import Finished, Guest

LINE = re.compile(r"(?P<word>ok|skipped|FAILED) +(?P<name>\w+) ")
LOAD = 15  # per cent of the usual numbers: the guest is emulated
LACKS = ("memory_dmabuf",)  # the device
RXM_LOAD = 5  # a connection of its takes 2 s there
CASE_S = 150
ALL_S = 540
PROGRAM = str(NATIVE / "conformance" / "conformance")  # built with the image
OPERATIONS = "tests/conformance/test_operations.py"


def entry(name: str) -> Provider:
    """What the suite knows of a provider."""
    return next(one for one in PROVIDERS if one.name == name)


def check(ended: Finished, cases: list[str], provider: Provider) -> None:
    """Sees that all of these cases ran, and passed unless the provider leaves them out."""
    assert ended.status == 0, ended.stdout + ended.stderr
    lines = [line for line in map(LINE.match, ended.stdout.splitlines()) if line]
    assert {line["name"]: line["word"] for line in lines} == {
        case: "skipped" if case in provider.left_out or case in LACKS else "ok" for case in cases
    }


@pytest.mark.long
@pytest.mark.timeout(ALL_S + 120)
def test_verbs(guest: Guest) -> None:
    ended = guest.run(
        [PROGRAM, "--load", str(LOAD), "--seconds", str(CASE_S), "--jobs", "2", "verbs", "rxe0"],
        check=False,
        timeout_s=ALL_S,
    )
    check(ended, CASES, entry("verbs"))


@pytest.mark.long
@pytest.mark.timeout(ALL_S + 120)
def test_rxm_over_verbs(guest: Guest) -> None:
    rxm = entry("libfabric-verbs")
    cases = [case for case in CASES if case not in rxm.known]
    ended = guest.run(
        [
            PROGRAM, "--load", str(RXM_LOAD), "--seconds", str(CASE_S), "--jobs", "2",
            "--fabric", "verbs;ofi_rxm", "libfabric", "rxe0", *cases,
        ],
        check=False,
        timeout_s=ALL_S,
    )  # fmt: skip
    check(ended, cases, rxm)


@pytest.mark.long
@pytest.mark.timeout(ALL_S + 240)
def test_operations_over_verbs(guest: Guest) -> None:
    """What clients do by two daemons of one host, both on its device."""
    tests = inner.run_pytest(
        guest,
        OPERATIONS,
        "-k",
        "[verbs",  # with parameters of their own behind it, or none
        "--require-provider",
        "verbs",
        "--timeout",
        str(CASE_S),
        timeout_s=ALL_S,
    )
    assert {test.outcome for test in tests} == {"passed"}
    ran = {re.split(r"::|\[", test.name)[1] for test in tests}
    assert ran == set(re.findall(r"^def (test_\w+)", (ROOT / OPERATIONS).read_text(), re.MULTILINE))
