# SPDX-License-Identifier: Apache-2.0
"""Bounds of what either side says, and the times that both sides keep.

Everything that comes from the other side is bounded here, so that a peer that says nonsense costs
neither a crash nor memory without end.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from transferd.client.errors import InvalidRequest

LETTER_BYTES_MAX = 8192  # a slot of a mailbox
TOKEN_BYTES = 16
FRAGMENTS_MAX = 40
NUMBER_MAX = (1 << 63) - 1
WINDOW = 65_536  # transfers above the lowest that lives; bounds what is remembered of ended ones
REQUEST_ID_BYTES_MAX = 256
DETAIL_BYTES_MAX = 512
DESCRIPTOR_BYTES_MAX = 1024
REGION_NAME_BYTES_MAX = 64
LAYOUT_BYTES_MAX = 131_072
FINGERPRINT_BYTES_MAX = 64
GRANTS_MAX = 1024
GROUPS_MAX = 64
PAGES_MAX = 65_536  # of a request, in all groups
STAGES_MAX = 256
READERS_MAX = 1024
PARTS_MAX = 64  # prefiller ranks of one transfer
TOKENS_MAX = 1 << 31
IMM_COUNT = 1 << 20
DEADLINE_MAX_MS = 3_600_000
TIMEOUT_MAX_MS = 600_000


@dataclass(frozen=True, slots=True)
class Settings:
    """Times, in seconds, and numbers of things at once. The defaults are those of README.md.

    Attributes:
        heartbeat_s: Between two Pings of a decoder.
        timeout_s: Without an answer for so long, the other side is lost.
        cancel_s: A prefiller that has not confirmed a Cancel by then is lost.
        hello_s: Between two Hellos; doubled up to ``timeout_s``.
        hello_timeout_s: A prefiller that has not answered by then is given up.
        retry_s: Until a message that was not delivered goes out again.
        grace_s: Counts of what a prefiller says it has pushed are here by then.
        lease_s: A prefill that is done is kept so long without a Request.
        partial_s: A message of several parts is whole by then.
        pairs: Other ranks at once.
        transfers: Transfers at once, of one pair at a prefiller.
        prefills: Prefills at once at a prefiller.
        partials: Requests of one pair of which parts are missing; Hellos of all.
        partial_bytes: Bytes of one pair's such Requests; of all Hellos.
        declined: Of one pair that is not made, at a decoder; of prefills that are not begun, at a
            prefiller, each decoder rank counted.
        released: Released prefills that a prefiller remembers, to refuse late Requests at once.
    """

    heartbeat_s: float = 1.0
    timeout_s: float = 3.0
    cancel_s: float = 2.0
    hello_s: float = 0.5
    hello_timeout_s: float = 30.0
    retry_s: float = 0.2
    grace_s: float = 1.0
    lease_s: float = 30.0
    partial_s: float = 10.0
    pairs: int = 256
    transfers: int = 4096
    prefills: int = 65_536
    partials: int = 256
    partial_bytes: int = 16 << 20
    declined: int = 4096
    released: int = 4096

    def __post_init__(self) -> None:
        """Checks all values.

        Raises:
            InvalidRequest: Names the one that is wrong.
        """
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
                raise InvalidRequest(f"{field.name} is a number above 0, not {value!r}")
        if self.timeout_s < 2 * self.heartbeat_s:
            raise InvalidRequest(
                f"timeout_s is at least twice heartbeat_s ({self.heartbeat_s}), not "
                f"{self.timeout_s}: one late answer would end a pair"
            )
        if self.timeout_s * 1000 > TIMEOUT_MAX_MS:
            raise InvalidRequest(f"timeout_s is at most {TIMEOUT_MAX_MS / 1000}")
