# SPDX-License-Identifier: Apache-2.0
"""The source tree, for tests that check the house rules."""

import tomllib
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
SOURCE_ROOTS = ("client", "daemon", "native", "proto", "tests", "deploy", ".ci")


def pyproject() -> dict[str, Any]:
    """Reads pyproject.toml."""
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def package_folders() -> dict[str, Path]:
    """Tells the folder of each package, from pyproject.toml."""
    folders: dict[str, str] = pyproject()["tool"]["setuptools"]["package-dir"]
    return {package: ROOT / folder for package, folder in folders.items()}


def is_generated(path: Path) -> bool:
    """Tells whether the build made a file."""
    return "_pb2" in path.name


def files(*suffixes: str) -> list[Path]:
    """Finds the hand-written files of the tree with these suffixes ("" for none)."""
    found: list[Path] = []
    for root in SOURCE_ROOTS:
        for path in sorted((ROOT / root).rglob("*")):
            hidden = "__pycache__" in path.parts or "build" in path.relative_to(ROOT).parts[:-1]
            if path.is_file() and path.suffix in suffixes and not hidden and not is_generated(path):
                found.append(path)
    return found


def module_name(path: Path) -> str | None:
    """Tells the import name of a file, None when it belongs to no package."""
    for package, folder in package_folders().items():
        if path.parent == folder:
            return package if path.stem == "__init__" else f"{package}.{path.stem}"
    return None
