# SPDX-License-Identifier: Apache-2.0
"""What ``transferd demo kv`` notes of its requests, and what it makes of that."""

from __future__ import annotations

import statistics
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from rich.table import Table

if TYPE_CHECKING:
    from rich.console import Console

TOKENS_SHOWN = 6


@dataclass(slots=True)
class Attempt:
    """A request at one prefiller and one decoder. Times are monotonic, s.

    Attributes:
        name: Of the transfer.
        prefiller: Who computes it.
        decoder: Who generates.
        asked: When the router had answered.
        pages: How many it needs, of all layers together.
        reused: Tokens that the prefiller had already.
        chunks: First token, last, and times: the begin, then the end of each layer.
        samples: When how many pages, of all layers together, had landed.
        landed: When the decoder had all; 0: never.
        ended: When all tokens were there, or it had failed.
        failed: How it ended; empty: well.
        detail: Why.
    """

    name: str
    prefiller: str
    decoder: str
    asked: float
    pages: int
    reused: int = 0
    chunks: list[tuple[int, int, list[float]]] = field(default_factory=list)
    samples: list[tuple[float, int]] = field(default_factory=list)
    landed: float = 0.0
    ended: float = 0.0
    failed: str = ""
    detail: str = ""

    @property
    def behind_s(self) -> float:
        """From the end of the last layer's keys and values to the last page's landing."""
        return max(0.0, self.samples[-1][0] - self.chunks[-1][2][-1])


@dataclass(slots=True)
class Request:
    """A prompt, and what became of it.

    Attributes:
        number: From 0 on.
        prompt: Its tokens.
        count: Tokens to generate.
        attempts: In their order.
        excluded: Prefillers that failed it.
        tokens: That a decoder has generated.
        single: That the single engine has.
    """

    number: int
    prompt: list[int]
    count: int
    attempts: list[Attempt] = field(default_factory=list)
    excluded: set[str] = field(default_factory=set)
    tokens: list[int] = field(default_factory=list)
    single: list[int] = field(default_factory=list)

    @property
    def equal(self) -> bool:
        """Whether both have generated the same."""
        return bool(self.tokens) and self.tokens == self.single


@dataclass(frozen=True, slots=True)
class Mark:
    """Something that happened to an engine.

    Attributes:
        at: Monotonic, s.
        text: For people.
        engine: Its name.
    """

    at: float
    text: str
    engine: str


@dataclass(frozen=True, slots=True)
class Outcome:
    """What the demo found.

    Attributes:
        requests: All.
        marks: What happened to engines.
        seconds: From the first request to the last token.
    """

    requests: list[Request]
    marks: list[Mark]
    seconds: float

    @property
    def wrong(self) -> list[int]:
        """Numbers of the requests whose tokens differ."""
        return [request.number for request in self.requests if not request.equal]

    @property
    def good(self) -> bool:
        """Whether every check passed."""
        return not self.wrong

    @property
    def last(self) -> list[Attempt]:
        """The attempts that went well."""
        return [request.attempts[-1] for request in self.requests]

    @property
    def failed(self) -> list[Attempt]:
        """Those that did not."""
        return [one for request in self.requests for one in request.attempts if one.failed]

    def served(self, role: str) -> dict[str, int]:
        """Counts the requests of each prefiller or decoder."""
        return dict(sorted(Counter(getattr(one, role) for one in self.last).items()))

    @property
    def behind_ms(self) -> float:
        """Median time from the last layer to the last page."""
        times = [one.behind_s for one in self.last if one.samples and one.chunks]
        return statistics.median(times) * 1e3 if times else 0.0

    def summary(self) -> dict[str, Any]:
        """Makes what ``--json`` prints."""
        return {
            "requests": len(self.requests),
            "prompt_tokens": sum(len(request.prompt) for request in self.requests),
            "reused_tokens": sum(one.reused for one in self.last),
            "generated_tokens": sum(len(request.tokens) for request in self.requests),
            "pages": sum(one.pages for one in self.last),
            "seconds": self.seconds,
            "prefillers": self.served("prefiller"),
            "decoders": self.served("decoder"),
            "failed": [
                {"transfer": one.name, "prefiller": one.prefiller, "outcome": one.failed}
                for one in self.failed
            ],
            "marks": [mark.text for mark in self.marks],
            "last_page_after_last_layer_ms": self.behind_ms,
            "wrong": self.wrong,
            "good": self.good,
        }


def show(console: Console, outcome: Outcome) -> None:
    """Prints the summary."""
    found = outcome.summary()
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold")
    table.add_column()
    table.add_row(
        "requests",
        f"{found['requests']} of {found['prompt_tokens']:,} tokens, of which prefillers had "
        f"{found['reused_tokens']:,} already",
    )
    for role in ("prefillers", "decoders"):
        table.add_row(role, ", ".join(f"{name} served {n}" for name, n in found[role].items()))
    failed = Counter(f"{one.failed} by {one.prefiller}" for one in outcome.failed)
    lost = ", ".join(f"{count} {what}" for what, count in failed.items())
    table.add_row("sent again", lost or "none")
    table.add_row("pages", f"{found['pages']:,} landed, counted layer by layer")
    table.add_row("last page", f"{outcome.behind_ms:.1f} ms after the last layer (median)")
    table.add_row(
        "time", f"{outcome.seconds:.1f} s for {found['generated_tokens']} generated tokens"
    )
    right = len(outcome.requests) - len(outcome.wrong)
    mark = "[green]yes[/green]" if outcome.good else "[red]NO[/red]"
    tokens = ", ".join(str(token) for token in outcome.requests[0].tokens[:TOKENS_SHOWN])
    table.add_row(
        "tokens equal", f"{mark}, {right} of {len(outcome.requests)}, [dim]{tokens}, …[/dim]"
    )
    console.print()
    console.print(table)
    for number in outcome.wrong:
        console.print(f"[red]wrong tokens: request {number}[/red]")
