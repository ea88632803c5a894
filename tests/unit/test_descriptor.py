# SPDX-License-Identifier: Apache-2.0
"""Descriptors: only the owner's own bytes, whole and unchanged, name a grant."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from transferd.daemon import errors
from transferd.daemon.descriptor import MAX_BYTES, PeerKey, Sealer, parse

OWNER = PeerKey(b"d" * 16, b"e" * 16)
ADDRESS = "10.1.2.3:7471"
SEALER = Sealer(OWNER, ADDRESS, b"secret")
GRANTS = st.integers(1, (1 << 64) - 1)


@given(GRANTS)
def test_what_is_sealed_is_verified(grant_id: int) -> None:
    raw = SEALER.seal(grant_id)
    assert len(raw) <= MAX_BYTES
    assert SEALER.verify(raw) == grant_id
    claim = parse(raw)
    assert (claim.owner, claim.address, claim.grant_id) == (OWNER, ADDRESS, grant_id)
    assert SEALER.seal(grant_id) == raw, "a grant has exactly one descriptor"


@given(GRANTS, st.data())
def test_flipped_bits_are_refused(grant_id: int, data: st.DataObject) -> None:
    raw = bytearray(SEALER.seal(grant_id))
    for bit in data.draw(st.sets(st.integers(0, len(raw) * 8 - 1), min_size=1, max_size=4)):
        raw[bit // 8] ^= 1 << bit % 8
    with pytest.raises(errors.TransferdError):
        SEALER.verify(bytes(raw))


@given(GRANTS, st.data())
def test_truncated_is_refused(grant_id: int, data: st.DataObject) -> None:
    raw = SEALER.seal(grant_id)
    cut = data.draw(st.integers(0, len(raw) - 1))
    with pytest.raises(errors.InvalidRequest) as caught:
        parse(raw[:cut])
    assert caught.value.reason == "DESCRIPTOR_INVALID"


@given(GRANTS, st.binary(min_size=1, max_size=8))
def test_lengthened_is_refused(grant_id: int, more: bytes) -> None:
    with pytest.raises(errors.InvalidRequest):
        parse(SEALER.seal(grant_id) + more)


@given(st.binary(max_size=400))
def test_garbage_is_refused(raw: bytes) -> None:
    for garbage in (raw, b"tfd1" + raw):
        with pytest.raises(errors.InvalidRequest):
            parse(garbage)


@given(GRANTS, st.binary(min_size=1, max_size=64).filter(lambda key: key != b"secret"))
def test_other_secrets_forge_nothing(grant_id: int, secret: bytes) -> None:
    # HMAC pads its key with zeros: such a key is the same key.
    if secret.rstrip(b"\0") == b"secret":
        return
    with pytest.raises(errors.AccessDenied) as caught:
        SEALER.verify(Sealer(OWNER, ADDRESS, secret).seal(grant_id))
    assert caught.value.reason == "DESCRIPTOR_FORGED"


@pytest.mark.parametrize("owner", [PeerKey(b"d" * 16, b"f" * 16), PeerKey(b"x" * 16, b"e" * 16)])
def test_of_another_life_is_stale(owner: PeerKey) -> None:
    """By its own name, also where the secret is the same: it is kept over restarts."""
    with pytest.raises(errors.StaleDescriptor):
        SEALER.verify(Sealer(owner, ADDRESS, b"secret").seal(1))


def test_address_that_does_not_fit() -> None:
    with pytest.raises(ValueError, match="too long"):
        Sealer(OWNER, f"{'h' * 300}:1", b"")
