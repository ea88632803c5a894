# SPDX-License-Identifier: Apache-2.0
"""Closing a connection that a GPU's helper copies for: nobody goes on before it has ended."""

from __future__ import annotations

import errno
from types import SimpleNamespace
from typing import TYPE_CHECKING

import pytest
from structlog.testing import capture_logs

from transferd.daemon import dataplane, stagecalls
from transferd.daemon.dataplane import DataPlane
from transferd.daemon.plane import Detail, PlaneError

if TYPE_CHECKING:
    from typing import Any

COPIES = -errno.EAGAIN


@pytest.mark.parametrize(("tries", "warnings"), [(1, 0), (3, 0), (500, 1)])
@pytest.mark.parametrize("end", [0, -errno.ENOENT, -errno.EIO])
async def test_it_is_closed_again_until_nobody_copies(
    monkeypatch: pytest.MonkeyPatch, tries: int, warnings: int, end: int
) -> None:
    answers = [*[COPIES] * (tries - 1), end]

    def close(_: Any, conn: int, detail: int, far: Any, landed: Any) -> int:
        assert (conn, detail) == (7, Detail.CONNECTION)
        landed.channels, landed.imms[0] = 1, 5
        return answers.pop(0)

    monkeypatch.setattr(stagecalls, "CLOSE_PAUSE_S", 0)
    monkeypatch.setattr(dataplane, "lib", SimpleNamespace(tfd_conn_close=close))
    plane = DataPlane(None)
    with capture_logs() as logs:
        if end == -errno.EIO:
            with pytest.raises(PlaneError, match="closing a connection"):
                await plane.conn_close(7, Detail.CONNECTION)
        else:
            assert await plane.conn_close(7, Detail.CONNECTION) == (5,)
    assert not answers
    assert [entry["log_level"] for entry in logs] == ["warning"] * warnings
