# SPDX-License-Identifier: Apache-2.0
"""Rules that prose would let rot: licence lines, sizes, forbidden words of C."""

import ast
import re
from pathlib import Path

import pytest

from support import tree

LICENCE = "SPDX-License-Identifier: Apache-2.0"
MAX_FILE_LINES = 600
MAX_FUNCTION_LINES = 100
SOURCES = (".py", ".pyi", ".c", ".h", ".proto")
SCRIPTS = (".sh", ".yaml", ".toml", "")


def short(path: Path) -> str:
    return str(path.relative_to(tree.ROOT))


def test_every_source_names_its_licence() -> None:
    unnamed = [
        short(path)
        for path in tree.files(*SOURCES, *SCRIPTS)
        if LICENCE not in "\n".join(path.read_text().splitlines()[:2])
    ]
    assert not unnamed


def test_no_merge_was_left_half_done() -> None:
    markers = re.compile(r"^(<<<<<<<|>>>>>>>) ", re.MULTILINE)
    halves = [
        short(path)
        for path in tree.files(*SOURCES, *SCRIPTS, ".md")
        if markers.search(path.read_text())
    ]
    assert not halves


def test_files_stay_readable() -> None:
    long = {short(path): len(path.read_text().splitlines()) for path in tree.files(*SOURCES)}
    assert {name: lines for name, lines in long.items() if lines > MAX_FILE_LINES} == {}


def python_functions(path: Path) -> dict[str, int]:
    """Tells the lines of each function of a Python file."""
    found = {}
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            found[f"{short(path)}:{node.name}"] = node.end_lineno - node.lineno + 1
    return found


def c_functions(path: Path) -> dict[str, int]:
    """Tells the lines of each function of a C file, which are those whose braces start a line."""
    found = {}
    begin = 0
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        if line == "{":
            begin = number
        elif line == "}" and begin:
            found[f"{short(path)}:{begin}"] = number - begin + 1
            begin = 0
    return found


def test_functions_stay_readable() -> None:
    lengths: dict[str, int] = {}
    for path in tree.files(".py"):
        lengths |= python_functions(path)
    for path in tree.files(".c", ".h"):
        lengths |= c_functions(path)
    assert lengths
    assert {name: lines for name, lines in lengths.items() if lines > MAX_FUNCTION_LINES} == {}


@pytest.mark.parametrize(
    ("pattern", "allowed"),
    [
        # Memory orders are spelled in one place.
        (r"__atomic_|__sync_|stdatomic\.h|atomic_thread_fence", {"native/core/barrier.h"}),
        # Unbounded or locale-dependent, with a better sibling each.
        (r"\b(strcpy|strcat|sprintf|gets|alloca|atoi)\s*\(", set()),
    ],
    ids=["memory-orders", "unsafe-calls"],
)
def test_c_does_without(pattern: str, allowed: set[str]) -> None:
    offenders = [
        f"{short(path)}:{number}"
        for path in tree.files(".c", ".h")
        if short(path) not in allowed and not short(path).startswith("native/tests/")
        for number, line in enumerate(path.read_text().splitlines(), start=1)
        if re.search(pattern, line)
    ]
    assert not offenders


def test_nothing_is_left_to_do() -> None:
    word = re.compile(r"\b(TO" + r"DO|FIX" + r"ME|XX" + r"X)\b")
    left = [short(path) for path in tree.files(*SOURCES, *SCRIPTS) if word.search(path.read_text())]
    assert not left
