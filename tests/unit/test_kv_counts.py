# SPDX-License-Identifier: Apache-2.0
"""Counters of a decoder, all looked at together."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from transferd.kv import counts as counts_module
from transferd.kv.counts import Counts


class FakeSession:
    def __init__(self, imms: range) -> None:
        self.slots = {imm: 7 * i for i, imm in enumerate(imms)}
        self.views = np.zeros((7 * len(imms), 4), dtype=np.uint64)
        self.reads = 0

    def read(self, slots: Any, views: Any) -> None:
        self.reads += 1
        views[:] = self.views[slots]

    def count(self, imm: int, value: int = 0, faults: int = 0) -> None:
        self.views[self.slots[imm], :2] += np.array([value, faults], dtype=np.uint64)


@pytest.fixture(autouse=True)
def _read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(counts_module, "read_slots", lambda session, *rest: session.read(*rest))


def made() -> tuple[Counts, FakeSession]:
    imms = range(100, 112)
    session = FakeSession(imms)
    return Counts(session, imms), session


def test_nothing_is_read_while_nothing_is_watched() -> None:
    counts, session = made()
    assert list(counts.look()) == []
    assert session.reads == 0


def test_targets_are_told_once_and_one_too_many_again() -> None:
    counts, session = made()
    counts.watch(104, (2, 3))
    session.count(104, 1)
    assert list(counts.look()) == []
    session.count(104, 1)
    session.count(105, 2)
    assert list(counts.look()) == [(104, 2)]
    assert list(counts.look()) == []
    session.count(105, 1)
    session.count(104, 1)
    assert list(counts.look()) == [(104, 3), (105, 3)]
    counts.forget(104, 2)
    session.count(104, 5)
    assert list(counts.look()) == []


def test_faults_are_told_once_those_of_before_not_at_all() -> None:
    counts, session = made()
    session.count(106, 0, 1)
    counts.watch(106, (9,))
    assert list(counts.look()) == []
    session.count(106, 0, 1)
    session.count(107, 0, 1)  # nobody's
    assert list(counts.look()) == [(106, None)]
    assert list(counts.look()) == []
    assert counts.faults_seen(106, 2) == [2, 0]
    assert counts.read(106, 2) == [(0, 2), (0, 1)]


def test_one_read_for_all() -> None:
    counts, session = made()
    for imm in range(100, 112, 3):
        counts.watch(imm, (1, 1, 1))
    session.reads = 0
    session.count(111, 1)
    assert list(counts.look()) == [(111, 1)]
    assert session.reads == 1
