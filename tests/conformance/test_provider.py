# SPDX-License-Identifier: Apache-2.0
"""The cases of native/conformance, which know a provider's table alone: each is a test here."""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest

from support.native_programs import make
from support.providers import CASES

if TYPE_CHECKING:
    from support.providers import Provider

pytestmark = pytest.mark.slow

LINE = re.compile(r"(?P<word>ok|skipped|FAILED) +(?P<name>\w+) +[\d.]+ s(?:  )?(?P<text>.*)")
JOBS = 3
SECONDS = 60  # that one case may take


@dataclass(frozen=True)
class Outcome:
    """What the program has told of a case."""

    word: str
    text: str


def wanted_of(request: pytest.FixtureRequest, provider: Provider) -> list[str]:
    """Names the cases that this run of pytest has chosen, and those that are left out."""
    chosen = [case for case in CASES if case in provider.left_out]
    for item in request.session.items:
        parameters = getattr(item, "callspec", None)
        if parameters is None or "case" not in parameters.params:
            continue
        if parameters.params["provider"] == provider:
            chosen.append(parameters.params["case"])
    return chosen


@pytest.fixture(scope="session")
def outcomes(request: pytest.FixtureRequest, provider: Provider) -> dict[str, Outcome]:
    """Runs all that is wanted of a provider, some at once: most of them wait most of the time.

    What is left out is run, too: the provider itself has to say that it has not what that is about.
    """
    program = make("-j2", "conformance", *provider.goals) / "conformance" / "conformance"
    cases = wanted_of(request, provider)
    options = ["--jobs", str(JOBS), "--seconds", str(SECONDS)]
    ended = subprocess.run(
        [program, *options, *provider.arguments(), *cases],
        check=False,
        capture_output=True,
        text=True,
        env=provider.variables(),
        timeout=SECONDS * len(cases),
    )
    lines = [LINE.fullmatch(line) for line in ended.stdout.splitlines()]
    told = {line["name"]: Outcome(line["word"], line["text"]) for line in lines if line}
    assert told.keys() == set(cases), ended.stdout + ended.stderr
    return told


@pytest.mark.timeout(600)  # the first has all of them run
@pytest.mark.parametrize("case", CASES)
def test_case(
    request: pytest.FixtureRequest, case: str, provider: Provider, outcomes: dict[str, Outcome]
) -> None:
    outcome = outcomes[case]
    if case in provider.known:
        request.applymarker(pytest.mark.xfail(reason=provider.known[case], strict=False))
    if outcome.word == "skipped" and case in provider.may_skip:
        pytest.skip(f"{provider.name}: {outcome.text}")
    assert outcome.word == "ok", f"{outcome.word}: {outcome.text}"


@pytest.mark.timeout(600)
def test_left_out(provider: Provider, outcomes: dict[str, Outcome]) -> None:
    words = {case: outcomes[case].word for case in CASES if case in provider.left_out}
    assert words == dict.fromkeys(words, "skipped")


def test_cases_are_found() -> None:
    program = make("conformance") / "conformance" / "conformance"
    listed = subprocess.run([program, "--list"], check=True, capture_output=True, text=True)
    assert [line.split()[0] for line in listed.stdout.splitlines()] == CASES


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "PROVIDER RAIL"),
        (["nobody", "rail0"], 'there is no provider "nobody"'),
        (["sim", "sim0", "no_case"], 'there is no case "no_case"'),
        (["--load", "0", "sim", "sim0"], "PROVIDER RAIL"),
        (["--fabric", "x" * 64, "sim", "sim0"], "longer than 63 bytes"),
    ],
)
def test_bad_arguments(arguments: list[str], said: str) -> None:
    program = make("conformance") / "conformance" / "conformance"
    ended = subprocess.run([program, *arguments], check=False, capture_output=True, text=True)
    assert ended.returncode == 2
    assert said in ended.stderr


def test_a_case_that_fails_fails_the_program() -> None:
    """Nothing but a rail that cannot be opened: each way to fail ends as a line and a status."""
    program = make("conformance") / "conformance" / "conformance"
    ended = subprocess.run(
        [program, "tcp", "no-such-rail0", "imm_alone"], check=False, capture_output=True, text=True
    )
    assert ended.returncode == 1
    found = LINE.match(ended.stdout)
    assert found is not None
    assert found["word"] == "FAILED"
    assert "no-such-rail0" in found["text"]
