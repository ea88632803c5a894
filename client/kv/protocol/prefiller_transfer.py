# SPDX-License-Identifier: Apache-2.0
"""A prefiller's transfers and prefills."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from transferd.kv.protocol.declined import Readers
from transferd.kv.protocol.prefiller_pairs import Done
from transferd.kv.protocol.prefiller_tables import PrefillState, State

if TYPE_CHECKING:
    from transferd.kv.protocol.actions import TransferKey
    from transferd.kv.protocol.messages import Reason, Request
    from transferd.kv.protocol.prefiller_pairs import Pair


@dataclass(slots=True, eq=False)
class Transfer:
    """Pages of one request for one decoder rank.

    Attributes:
        done: Tokens up to here are pushed, or on their way.
        units: Numbers of the pushes that have not ended.
        next_unit: Number of the next one.
        last: The last push, with the tail, is out.
        end: How it ends, once it stops.
        asked: The decoder waits for a Cancelled.
    """

    key: TransferKey
    pair: Pair
    request: Request
    state: State = State.WAITING
    done: int = 0
    units: set[int] = field(default_factory=set)
    next_unit: int = 0
    last: bool = False
    end: Done | Reason = Done.PUSHED
    detail: str = ""
    asked: bool = False


@dataclass(slots=True, eq=False)
class Prefill:
    """What the engine computes for one request.

    Attributes:
        computed: Tokens that are computed, or will be by what the engine has started.
        transfers: Those under way.
        readers: Who wants it, and has read it.
    """

    request_id: bytes
    state: PrefillState = PrefillState.COMPUTING
    computed: int = 0
    transfers: dict[TransferKey, Transfer] = field(default_factory=dict)
    readers: Readers = field(default_factory=Readers)

    @property
    def finished(self) -> bool:
        """Whether nothing more will be computed."""
        return self.state is PrefillState.HELD
