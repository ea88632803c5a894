# SPDX-License-Identifier: Apache-2.0
"""Descriptors: the opaque bytes that name a grant. Sans-IO.

    "tfd1" | version u8 | address length u8 | grant id u64 | daemon id 16 | boot epoch 16
           | address | CRC-32 u32 | MAC 32

The CRC lets a holder's daemon refuse a damaged descriptor before it asks anybody; the MAC
(HMAC-SHA-256 by the owner's own secret, over all before it) is what the owner trusts. No keys and
no NIC addresses are inside.
"""

from __future__ import annotations

import hashlib
import hmac
import struct
import zlib
from dataclasses import dataclass
from typing import NamedTuple

from transferd.daemon.config import split_host_port
from transferd.daemon.errors import AccessDenied, InvalidRequest, StaleDescriptor

MAGIC = b"tfd1"
VERSION = 1
MAC_BYTES = 32
ADDRESS_MAX = 255
_HEAD = struct.Struct(">4sBBQ16s16s")
_CRC = struct.Struct(">I")
MAX_BYTES = _HEAD.size + ADDRESS_MAX + _CRC.size + MAC_BYTES


class PeerKey(NamedTuple):
    """Which daemon, in which of its lives."""

    daemon_id: bytes
    boot_epoch: bytes

    def __str__(self) -> str:
        return f"{self.daemon_id.hex()[:8]}@{self.boot_epoch.hex()[:8]}"


@dataclass(frozen=True, slots=True)
class Claim:
    """What a descriptor says; nothing of it is proven until its owner has checked the MAC."""

    owner: PeerKey
    address: str
    grant_id: int


def _damaged(what: str) -> InvalidRequest:
    return InvalidRequest(
        "descriptor", f"{what}; pass the owner's bytes on unchanged", reason="DESCRIPTOR_INVALID"
    )


def parse(raw: bytes) -> Claim:
    """Reads a descriptor.

    Args:
        raw: What a client handed over.

    Returns:
        What it claims.

    Raises:
        InvalidRequest: DESCRIPTOR_INVALID: it is truncated, damaged or no descriptor at all.
    """
    if raw[: len(MAGIC)] != MAGIC:
        raise _damaged("not a descriptor of transferd")
    if len(raw) < _HEAD.size + _CRC.size + MAC_BYTES:
        raise _damaged(f"truncated to {len(raw)} bytes")
    _, version, size, grant_id, daemon_id, boot_epoch = _HEAD.unpack_from(raw)
    end = _HEAD.size + size
    if version != VERSION:
        raise _damaged(f"version {version} is unknown to this daemon")
    if len(raw) != end + _CRC.size + MAC_BYTES:
        raise _damaged(f"{len(raw)} bytes instead of {end + _CRC.size + MAC_BYTES}")
    if _CRC.unpack_from(raw, end)[0] != zlib.crc32(raw[:end]):
        raise _damaged("its checksum does not match")
    try:
        address = raw[_HEAD.size : end].decode("ascii")
        split_host_port(address)
    except ValueError:
        raise _damaged("its address is not host:port") from None
    return Claim(PeerKey(daemon_id, boot_epoch), address, grant_id)


class Sealer:
    """Makes and checks the descriptors of one daemon in one life."""

    def __init__(self, owner: PeerKey, address: str, secret: bytes) -> None:
        """Takes what every descriptor of this daemon carries.

        Args:
            owner: This daemon.
            address: host:port that peers reach it at; at most 255 ASCII bytes.
            secret: Key of the MAC; never leaves the daemon.
        """
        self._owner = owner
        self._address = address.encode("ascii")
        self._secret = secret
        if len(self._address) > ADDRESS_MAX:
            raise ValueError("the peer address is too long")

    def seal(self, grant_id: int) -> bytes:
        """Makes the descriptor of a grant."""
        head = _HEAD.pack(
            MAGIC,
            VERSION,
            len(self._address),
            grant_id,
            self._owner.daemon_id,
            self._owner.boot_epoch,
        )
        body = head + self._address
        body += _CRC.pack(zlib.crc32(body))
        return body + self._mac(body)

    def _mac(self, body: bytes) -> bytes:
        return hmac.new(self._secret, body, hashlib.sha256).digest()

    def verify(self, raw: bytes) -> int:
        """Checks a descriptor that a peer presents.

        Args:
            raw: The bytes as the peer's client handed them over.

        Returns:
            The grant's number.

        Raises:
            InvalidRequest: It is damaged.
            StaleDescriptor: It is of another daemon or of an earlier life of this one.
            AccessDenied: DESCRIPTOR_FORGED: its MAC is not ours.
        """
        claim = parse(raw)
        if claim.owner != self._owner:
            raise StaleDescriptor(
                f"the descriptor is of daemon {claim.owner}, this is {self._owner}; get a new "
                "one from its owner"
            )
        if not hmac.compare_digest(self._mac(raw[:-MAC_BYTES]), raw[-MAC_BYTES:]):
            raise AccessDenied(
                "the descriptor was not made by this daemon; get one from the grant's owner",
                reason="DESCRIPTOR_FORGED",
            )
        return claim.grant_id
