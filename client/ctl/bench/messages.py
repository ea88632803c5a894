# SPDX-License-Identifier: Apache-2.0
"""What an initiator may ask of a target. It is not trusted: whatever does not fit is refused."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Base64Bytes, BaseModel, ConfigDict, Field, TypeAdapter

from transferd.client.ctl.bench.sweep import INITIATORS_MAX

Count = Annotated[int, Field(ge=0, le=1 << 62)]
Length = Annotated[int, Field(ge=1, le=1 << 40)]


class Message(BaseModel):
    """What all have.

    Attributes:
        guest: Names the initiator.
        number: Of the message; its answer has the same. 0: nobody waits for one.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    guest: str = Field(min_length=1, max_length=64)
    number: Count


class Hello(Message):
    """The first: where the answers go. What later protocols add to it is passed over."""

    model_config = ConfigDict(extra="ignore", strict=True, frozen=True)

    do: Literal["hello"]
    protocol: int
    version: str = Field(max_length=64)
    host: str = Field(max_length=256)
    reply_to: Base64Bytes


class Sessions(Message):
    """Asks for the sessions of a scheme; ends those of the one before."""

    do: Literal["sessions"]
    scheme: Literal["pairs", "many-to-one"]
    initiators: int = Field(ge=1, le=INITIATORS_MAX)


class Open(Message):
    """Asks for memory: ``length`` bytes for each initiator."""

    do: Literal["open"]
    step: Count
    operation: Literal["write", "pages", "read", "scatter", "imm"]
    length: Length
    seed: Count


class Places(Message):
    """Asks for places, from one on; the answer has as many as fit."""

    do: Literal["places"]
    first: int = Field(ge=0, lt=INITIATORS_MAX)


class Ready(Message):
    """Asks to begin; the answer comes when all initiators that are expected have asked."""

    do: Literal["ready"]


class Verify(Message):
    """Asks whether all has landed, for each initiator: bytes of its part, and counts."""

    do: Literal["verify"]
    lengths: list[Count] = Field(max_length=INITIATORS_MAX)
    counts: list[Count] = Field(max_length=INITIATORS_MAX)


class Close(Message):
    """Gives the memory back."""

    do: Literal["close"]


class Bye(Message):
    """The last; nobody waits for an answer."""

    do: Literal["bye"]


class Ping(Message):
    """Asks whether the target lives: that it can be delivered, or (with a number) an answer."""

    do: Literal["ping"]


Any = Annotated[
    Hello | Sessions | Open | Places | Ready | Verify | Close | Bye | Ping,
    Field(discriminator="do"),
]
parse = TypeAdapter(Any).validate_json
