# SPDX-License-Identifier: Apache-2.0
"""What has landed by a connection, as daemons tell each other."""

from __future__ import annotations

import pytest

from transferd.daemon.peerclient import read_landed
from transferd.daemon.services.peer import write_landed
from transferd.peer.v1 import peer_pb2 as pb


@pytest.mark.parametrize("landed", [None, (0,), (7,), (1, 2, 3), (0, 0, 2**64 - 1)])
def test_round_trip(landed: tuple[int, ...] | None) -> None:
    wire = write_landed(landed).SerializeToString()
    assert read_landed(pb.Landed.FromString(wire)) == landed


def test_what_cannot_be_is_unknown() -> None:
    assert read_landed(pb.Landed(immediates=1, further=[2, 3, 4])) is None
    assert read_landed(pb.Landed(further=[2, 3])) is None


def test_a_daemon_that_knows_one_channel_reads_the_first() -> None:
    """The field that it knows has kept its number and its meaning."""
    assert write_landed((5,)).SerializeToString() == b"\x08\x05"
