# SPDX-License-Identifier: Apache-2.0
"""Addresses of prefillers, and what a decoder rank wants of one of their ranks, as bytes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from google.protobuf.message import DecodeError

from transferd.kv import wire
from transferd.kv.layout import check_name, check_number, refuse
from transferd.kv.protocol import bounds
from transferd.kv.v1 import address_pb2 as pb

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from transferd.kv.layout import Layout, Slice

STEPS_MAX = 4096


@dataclass(frozen=True, slots=True)
class Rank:
    """A rank of a prefiller.

    Attributes:
        name: For people.
        boot: 16 random bytes of this life of it.
        mailbox: Descriptor.
        layout: Of its cache.
    """

    name: str
    boot: bytes
    mailbox: bytes
    layout: Layout

    def __post_init__(self) -> None:
        check_name("a rank's name", self.name)
        check_number("bytes of a rank's boot", len(self.boot), 16, 16)
        check_number("bytes of a mailbox", len(self.mailbox), 1, bounds.DESCRIPTOR_BYTES_MAX)


@dataclass(frozen=True, slots=True)
class Offer:
    """What a decoder rank wants of a prefiller rank, and where it keeps it.

    Attributes:
        layout: Of its cache.
        wanted: What the prefiller rank sends.
        tail: Whether it sends the tail.
        steps: Layers that are sent together.
        tails_bytes: Of its region of tails.
    """

    layout: Layout
    wanted: tuple[Slice, ...]
    tail: bool
    steps: tuple[tuple[int, ...], ...]
    tails_bytes: int


def pack(ranks: Iterable[Rank]) -> bytes:
    """Makes the address of a prefiller of its ranks, in their order."""
    message = pb.Address(
        ranks=[
            pb.Rank(
                name=rank.name,
                boot=rank.boot,
                mailbox=rank.mailbox,
                layout=wire.layout_to_proto(rank.layout),
            )
            for rank in ranks
        ]
    )
    return message.SerializeToString(deterministic=True)


def unpack(address: bytes) -> tuple[Rank, ...]:
    """Reads the address of a prefiller.

    Raises:
        InvalidRequest: ADDRESS: it is none; LAYOUT: a rank's layout is wrong.
    """
    message = pb.Address()
    try:
        message.ParseFromString(address)
    except (DecodeError, TypeError):
        refuse("an address is what Prefiller.address or kv.join gives", "ADDRESS")
    if not 1 <= len(message.ranks) <= bounds.PARTS_MAX:
        refuse(f"an address has 1 to {bounds.PARTS_MAX} ranks, not {len(message.ranks)}", "ADDRESS")
    return tuple(
        Rank(rank.name, rank.boot, rank.mailbox, wire.layout_from_proto(rank.layout))
        for rank in message.ranks
    )


def join(addresses: Sequence[bytes]) -> bytes:
    """Makes the address of a prefiller of several ranks out of theirs.

    Args:
        addresses: Of its ranks, in the order of their numbers; every decoder has to be told the
            same order.

    Raises:
        InvalidRequest: ADDRESS.
    """
    return pack(rank for address in addresses for rank in unpack(address))


def pack_offer(offer: Offer) -> bytes:
    """Makes the bytes that a Hello carries."""
    message = pb.Offer(
        layout=wire.layout_to_proto(offer.layout),
        wanted=[wire.slice_to_proto(part) for part in offer.wanted],
        tail=offer.tail,
        steps=[pb.Step(layers=step) for step in offer.steps],
        tails_bytes=offer.tails_bytes,
    )
    return message.SerializeToString(deterministic=True)


def unpack_offer(data: bytes) -> Offer:
    """Reads what a decoder rank wants.

    Raises:
        InvalidRequest: It is wrong by itself; the message says in what.
    """
    message = pb.Offer()
    try:
        message.ParseFromString(data)
    except DecodeError:
        refuse(f"{len(data)} bytes are no layout of a decoder")
    if len(message.steps) > STEPS_MAX:
        refuse(f"there are at most {STEPS_MAX} steps, not {len(message.steps)}")
    return Offer(
        layout=wire.layout_from_proto(message.layout),
        wanted=tuple(wire.slice_from_proto(part) for part in message.wanted),
        tail=message.tail,
        steps=tuple(tuple(step.layers) for step in message.steps),
        tails_bytes=message.tails_bytes,
    )
