# SPDX-License-Identifier: Apache-2.0
"""Daemons that several tests of a module share, because none of them kills a daemon.

A folder's conftest.py imports both fixtures.
"""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from support.daemon import DaemonProcess
from support.grpc_session import tenants

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(scope="module")
def shared_pair() -> Iterator[tuple[DaemonProcess, DaemonProcess]]:
    """Gives two daemons for all tests of a module; at the end they must stop well."""
    base = Path(tempfile.mkdtemp(prefix="tfd-"))
    with contextlib.ExitStack() as stack:
        stack.callback(shutil.rmtree, base, ignore_errors=True)
        made = []
        for name in "ab":
            (base / name).mkdir()
            made.append(DaemonProcess(base / name, {"tenants": tenants()}))
            stack.enter_context(made[-1].start())
        yield made[0], made[1]


@pytest.fixture(autouse=True)
def show_shared_logs(request: pytest.FixtureRequest) -> None:
    """Has a failure show the shared daemons' logs."""
    if "shared_pair" in request.fixturenames:
        request.node.transferd_daemons = list(request.getfixturevalue("shared_pair"))
