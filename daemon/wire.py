# SPDX-License-Identifier: Apache-2.0
"""What daemons say to each other, as values: transferd.peer.v1 without protobuf.

Two things speak it: :class:`transferd.daemon.peerclient.GrpcLink` to other daemons, and
:class:`transferd.daemon.loopback.LoopbackLink` where owner and opener are this very daemon.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from transferd.daemon.errors import InvalidRequest

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transferd.daemon.descriptor import PeerKey
    from transferd.daemon.plane import Landed, RegionKey

BATCH_MAX = 4096  # grants, losses or connections in one message
PROTOCOLS_MAX = 64  # TFD_MAX_RAILS
PROTOCOL_BYTES_MAX = 63  # TFD_NAME_MAX


def check_protocols(protocols: Sequence[str]) -> None:
    """Refuses what cannot be the protocols of a daemon's rails.

    Raises:
        InvalidRequest: Names the field.
    """
    if not 1 <= len(protocols) <= PROTOCOLS_MAX:
        raise InvalidRequest(
            "rail_protocols", f"{len(protocols)} of them; send 1 to {PROTOCOLS_MAX}"
        )
    for i, name in enumerate(protocols):
        if not 1 <= len(name.encode()) <= PROTOCOL_BYTES_MAX:
            raise InvalidRequest(
                f"rail_protocols[{i}]",
                f"has {len(name.encode())} bytes; send 1 to {PROTOCOL_BYTES_MAX}",
            )


@dataclass(frozen=True, slots=True)
class Hello:
    """A daemon introduces itself; `token` is what the other's heartbeats to it carry.

    A different token than before says that the daemon has forgotten everything it held of the
    other.
    """

    key: PeerKey
    address: str
    protocols: tuple[str, ...]
    token: bytes
    port: int


@dataclass(frozen=True, slots=True)
class HelloReply:
    """The callee's side of it."""

    key: PeerKey
    protocols: tuple[str, ...]
    token: bytes
    port: int


@dataclass(frozen=True, slots=True)
class Half:
    """The caller's half of a connection that it writes on."""

    connection_id: int
    callee_rail: int
    protocol: str
    address: bytes


@dataclass(frozen=True, slots=True)
class GrantKeys:
    """What an opener needs to write."""

    grant_id: int
    length: int
    rights: int
    imm_first: int
    imm_count: int
    name_space: int
    rails: tuple[RegionKey, ...]
    expires_ms: int
    isolation: int
    device: bool = False  # a rail with key 0 does not reach it

    def reached_by(self, rail: int) -> bool:
        """Whether a rail of the owner's reaches the grant's memory."""
        return rail < len(self.rails) and self.rails[rail].key != 0


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a grant was not opened."""

    reason: str
    message: str


@dataclass(frozen=True, slots=True)
class Loss:
    """Writes on one immediate that will not land; count 0: their fate is unknown.

    `units`: eighths of writes that have landed of them all the same, to be taken out of the count.
    """

    grant_id: int
    imm: int
    count: int
    units: int = 0


@dataclass(frozen=True, slots=True)
class GrantFence:
    """Immediates of a grant, as ranges that ascend and do not overlap."""

    grant_id: int
    imms: tuple[range, ...]


class Link(Protocol):
    """Calls to one other daemon. Each is bounded, and raises a TransferdError when it fails."""

    async def hello(self, hello: Hello, callee: PeerKey) -> HelloReply:
        """Introduces this daemon."""

    async def connect(self, callee_epoch: bytes, halves: Sequence[Half]) -> list[bytes]:
        """Has the callee make its halves; returns their addresses."""

    async def disconnect(self, connection_ids: Sequence[int]) -> list[Landed | None]:
        """Has the callee destroy its halves; tells what has landed by each, if known."""

    async def open_grants(self, descriptors: Sequence[bytes]) -> list[GrantKeys | Refusal]:
        """Opens grants."""

    async def release_grants(self, grant_ids: Sequence[int], *, abandoned: bool) -> None:
        """Gives opens back."""

    async def revoke_grants(self, grant_ids: Sequence[int], timeout_s: float) -> None:
        """Owner to opener; returns when nothing is in flight on them."""

    async def fence_grants(self, fences: Sequence[GrantFence], timeout_s: float) -> set[int]:
        """Owner to opener; returns when nothing submitted before on these imms is in flight.

        Of the grants that it gives, a client's stream on this host may be writing all the same.
        """

    async def report_loss(self, number: int, losses: Sequence[Loss]) -> None:
        """Writer to receiver. `number` counts the reports: the owner takes each once."""

    async def aclose(self) -> None:
        """Ends the link; calls in flight fail."""
