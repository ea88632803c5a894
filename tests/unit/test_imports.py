# SPDX-License-Identifier: Apache-2.0
"""The arrows between the packages point one way, and nobody pays for what it does not use."""

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from support import tree

# Package -> packages that it must not import, however deep.
FORBIDDEN = {
    "transferd.client": ("transferd.daemon",),
    "transferd.kv": ("transferd.daemon", "transferd.native"),
    "transferd.kv.protocol": ("asyncio", "grpc", "socket", "threading", "time"),
    "transferd.daemon": ("transferd.client", "transferd.kv"),
    "transferd.native": ("transferd.client", "transferd.daemon", "transferd.kv"),
    "transferd.v1": ("transferd.client", "transferd.daemon", "transferd.native"),
    "transferd.peer": ("transferd.client", "transferd.daemon", "transferd.native"),
}
CLIENT_NATIVE = ("client_half", "entry", "names", "errors")


def imports_of(path: Path) -> Iterator[str]:
    """Lists the full names that a file imports, wherever in it; `if TYPE_CHECKING` counts, too."""
    module = tree.module_name(path) or ""
    package = module if path.stem == "__init__" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")
                parents = parents[: len(parents) - node.level + 1]
                base = ".".join([*parents, base]) if base else ".".join(parents)
            yield from (f"{base}.{alias.name}" for alias in node.names)


def is_within(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


def modules() -> list[tuple[str, Path]]:
    named = [(tree.module_name(path), path) for path in tree.files(".py")]
    return [(name, path) for name, path in named if name is not None]


def test_packages_import_one_way() -> None:
    wrong = [
        f"{module} imports {name}"
        for module, path in modules()
        for package, banned in FORBIDDEN.items()
        if is_within(module, package)
        for name in imports_of(path)
        if any(is_within(name, other) for other in banned)
    ]
    assert not wrong


def test_only_dataplane_imports_native() -> None:
    wrong = [
        f"{module} imports {name}"
        for module, path in modules()
        if is_within(module, "transferd.daemon") and module != "transferd.daemon.dataplane"
        for name in imports_of(path)
        if is_within(name, "transferd.native")
    ]
    assert not wrong


def test_cores_do_not_import_services() -> None:
    wiring = {f"transferd.daemon.{name}" for name in ("main", "server", "listeners", "metrics")}
    wrong = [
        f"{module} imports {name}"
        for module, path in modules()
        if is_within(module, "transferd.daemon")
        and not is_within(module, "transferd.daemon.services")
        and module not in wiring
        for name in imports_of(path)
        if is_within(name, "transferd.daemon.services")
    ]
    assert not wrong


def test_services_do_not_import_the_data_plane() -> None:
    wrong = [
        f"{module} imports {name}"
        for module, path in modules()
        if is_within(module, "transferd.daemon.services")
        for name in imports_of(path)
        if is_within(name, "transferd.daemon.dataplane")
    ]
    assert not wrong


def test_client_imports_only_its_half_of_native() -> None:
    allowed = tuple(f"transferd.native.{name}" for name in CLIENT_NATIVE)
    wrong = [
        f"{module} imports {name}"
        for module, path in modules()
        if is_within(module, "transferd.client")
        for name in imports_of(path)
        if is_within(name, "transferd.native")
        and name != "transferd.native"
        and not any(is_within(name, half) for half in allowed)
    ]
    assert not wrong


def test_kv_protocol_knows_no_client() -> None:
    wrong = [
        f"{module} imports {name}"
        for module, path in modules()
        if is_within(module, "transferd.kv.protocol")
        for name in imports_of(path)
        if is_within(name, "transferd.client") and not is_within(name, "transferd.client.errors")
    ]
    assert not wrong


def test_source_folders_are_never_imported_by_their_short_names() -> None:
    short = ("client", "daemon", "native", "proto")
    wrong = [
        f"{path.relative_to(tree.ROOT)} imports {name}"
        for path in tree.files(".py")
        for name in imports_of(path)
        if any(is_within(name, folder) for folder in short)
    ]
    assert not wrong


def loaded_by(statement: str) -> set[str]:
    """Tells which modules a fresh interpreter has loaded after a statement."""
    code = f"import json, sys\n{statement}\nprint(json.dumps(sorted(sys.modules)))"
    result = subprocess.run(
        [sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    return set(json.loads(result.stdout.splitlines()[-1]))


@pytest.mark.parametrize(
    ("statement", "absent"),
    [
        ("import transferd", {"transferd.client", "transferd.daemon", "transferd.native", "grpc"}),
        (
            "import transferd; transferd.Client",
            {"transferd.daemon", "transferd.native._core", "numpy", "torch"},
        ),
        ("import transferd.daemon.main", {"transferd.client", "transferd.native._client", "numpy"}),
    ],
    ids=["root", "client", "daemon"],
)
def test_nothing_unused_is_loaded(statement: str, absent: set[str]) -> None:
    assert not loaded_by(statement) & absent
