# SPDX-License-Identifier: Apache-2.0
"""What the scheduler's half tells the workers' half with each step."""

from __future__ import annotations

from dataclasses import dataclass, field

Blocks = tuple[list[int], ...]  # of each of vLLM's groups


@dataclass(slots=True)
class Receive:
    """A request whose cache comes from a prefiller.

    Attributes:
        transfer_id: Names it at the prefiller: a digest of the id that users see and the prompt.
        address: Of the prefiller's engine.
        blocks: Its whole block tables.
        tokens: From the request's first one on.
        first_token: Those before it are here already.
        deadline_s: By then it is here, or is computed here.
    """

    transfer_id: bytes
    address: bytes
    blocks: Blocks
    tokens: int
    first_token: int
    deadline_s: float


@dataclass(slots=True)
class Progress:
    """A request that is computed here for a decoder.

    Attributes:
        transfer_id: Names it, as a Receive's.
        blocks: That it has got since it was spoken of last.
        tokens: That are computed when this step is done, from the request's first one on.
        prompt: Tokens that will be.
    """

    transfer_id: bytes
    blocks: Blocks
    tokens: int
    prompt: int


@dataclass(slots=True)
class Work:
    """All of a step, by vLLM's request id.

    Attributes:
        receive: To be asked for.
        cancel: Are wanted no more.
        declined: Are not asked for, and will not be: what names each at the prefiller, its address.
        preempted: Lose their blocks: nobody may read them any more when this step begins.
        compute: Are computed by this step.
        finished: Are computed, and held for who asks.
        aborted: Have ended before they were computed; held until nobody reads them.
    """

    receive: dict[str, Receive] = field(default_factory=dict)
    cancel: list[str] = field(default_factory=list)
    declined: list[tuple[bytes, bytes]] = field(default_factory=list)
    preempted: list[str] = field(default_factory=list)
    compute: dict[str, Progress] = field(default_factory=dict)
    finished: list[str] = field(default_factory=list)
    aborted: list[str] = field(default_factory=list)
