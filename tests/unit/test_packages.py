# SPDX-License-Identifier: Apache-2.0
"""pyproject.toml and the tree say the same."""

import importlib
import importlib.metadata

import pytest

import transferd

from support import tree


def test_packages_and_folders_are_listed_alike() -> None:
    settings = tree.pyproject()["tool"]["setuptools"]
    assert sorted(settings["packages"]) == sorted(settings["package-dir"])
    assert settings["packages"] == sorted(settings["packages"])


def test_every_folder_with_modules_is_a_package() -> None:
    in_tree = {
        path.parent
        for path in tree.files(".py")
        if path.relative_to(tree.ROOT).parts[0] in ("client", "daemon", "native", "proto")
    }
    listed = tree.package_folders()
    assert in_tree - {tree.ROOT / "proto/transferd/kv"} == set(listed.values())
    missing = [
        package for package, folder in listed.items() if not (folder / "__init__.py").exists()
    ]
    assert not missing


@pytest.mark.parametrize("package", sorted(tree.package_folders()))
def test_every_package_imports(package: str) -> None:
    importlib.import_module(package)


def test_versions_agree() -> None:
    assert transferd.__version__ == tree.pyproject()["project"]["version"]
    assert importlib.metadata.version("transferd") == transferd.__version__


def test_public_names_exist() -> None:
    assert sorted(transferd.__all__) == sorted([*transferd.client.__all__, "__version__"])
    missing = [name for name in transferd.__all__ if not hasattr(transferd, name)]
    assert not missing
    assert importlib.import_module("transferd.aio").Client is transferd.aio.Client  # type: ignore[attr-defined]
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = transferd.nothing


def test_generated_code_and_runtime_floors_agree() -> None:
    project = tree.pyproject()
    (pin,) = [need for need in project["build-system"]["requires"] if "grpcio-tools" in need]
    oldest = pin.partition("==")[2]
    floors = [need for need in project["project"]["dependencies"] if need.startswith("grpcio")]
    assert floors
    assert all(f">={oldest}," in need for need in floors)
