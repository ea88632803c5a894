# SPDX-License-Identifier: Apache-2.0
"""What an initiator may ask of a target, and the answers. Neither trusts the other's."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Base64Bytes, BaseModel, ConfigDict, Field, TypeAdapter

from transferd.client.ctl.bench.machine import Machine  # noqa: TC001, pydantic reads it
from transferd.client.ctl.bench.sweep import INITIATORS_MAX

Count = Annotated[int, Field(ge=0, le=1 << 62)]
Rate = Annotated[float, Field(ge=0, le=1e15, allow_inf_nan=False)]
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
    """Asks to begin; the answer comes when all initiators that are expected have asked.

    Attributes:
        step: What it is about to do, the same for all.
    """

    do: Literal["ready"]
    step: str = Field(max_length=256)


class Done(Message):
    """Tells rates; the answer, when all have told theirs, is their sum."""

    do: Literal["done"]
    step: str = Field(max_length=256)
    gbit_per_s: Rate
    operations_per_s: Rate


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
    Hello | Sessions | Open | Places | Ready | Done | Verify | Close | Bye | Ping,
    Field(discriminator="do"),
]
parse = TypeAdapter(Any).validate_json


# ---- answers ----


class Reply(BaseModel):
    """What all have; what later targets add is passed over."""

    model_config = ConfigDict(extra="ignore", frozen=True)


class Greeted(Reply):
    """To hello."""

    machine: Machine


class Opened(Reply):
    """To open."""

    register_ms: float


class Where(BaseModel):
    """Where an initiator's bytes go: descriptor (base64), first byte in its range, immediate."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    descriptor: str
    base: Count
    imm: int = Field(ge=0, lt=1 << 20)


class Placed(Reply):
    """To places."""

    places: list[Where] = Field(min_length=1, max_length=INITIATORS_MAX)


class Together(Reply):
    """To ready and done: how many hosts, and the sums of their rates."""

    hosts: int
    gbit_per_s: Rate
    operations_per_s: Rate


class Verified(Reply):
    """To verify: bytes compared, or the first that differs (where, what is there, what ought)."""

    compared: Count = 0
    initiator: Count = 0
    difference: tuple[int, int, int] | None = None
