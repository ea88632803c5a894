# SPDX-License-Identifier: Apache-2.0
"""The picture of ``transferd demo kv``: layers computed and pages landed, one row a request."""

from __future__ import annotations

import html
import itertools
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from transferd.client.demo.kvrecord import Attempt, Outcome, Request

LEFT, TOP, WIDTH = 190, 92, 1100
ROW, BAR = 34, 13
COLOURS = ("#3b6fb6", "#c0504d", "#4e9a57", "#8064a2", "#d08a2e", "#2a9d9d")
LANDED, DECODE = "#e0a030", "#b8b8b8"
TICKS = 10

_PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>transferd demo kv</title>
<style>
body {{ font: 14px system-ui, sans-serif; margin: 24px; color: #222; background: #fff; }}
svg text {{ font: 11px system-ui, sans-serif; fill: #444; }}
p {{ max-width: 90em; }}
i {{ display: inline-block; width: 12px; height: 12px; margin: 0 4px 0 14px; }}
</style></head><body>
<h1>transferd demo kv</h1>
<p>{summary}</p>
<p>Upper half of a row: layers computed by a prefiller, one cell a layer, chunk after chunk.
Lower half: share of the pages that have landed in the decoder's memory, then its generating.
Point at something for its numbers.</p>
<p>{legend}</p>
{svg}
</body></html>
"""


def write(path: Path, outcome: Outcome) -> None:
    """Writes the picture as one HTML file that needs nothing else."""
    path.write_text(render(outcome), encoding="utf-8")


def render(outcome: Outcome) -> str:
    """Makes the file's text."""
    picture = _Picture(outcome)
    found = outcome.summary()
    summary = (
        f"{found['requests']} requests in {outcome.seconds:.1f} s; {len(outcome.failed)} attempts "
        f"sent again; the last page landed {outcome.behind_ms:.1f} ms after the last layer "
        f"(median); tokens equal those of a single engine: {'yes' if outcome.good else 'NO'}."
    )
    boxes = [*picture.colours.items(), ("pages landed", LANDED), ("decode", DECODE)]
    legend = "".join(
        f'<i style="background:{colour}"></i>{html.escape(name)}' for name, colour in boxes
    )
    return _PAGE.format(summary=html.escape(summary), legend=legend, svg=picture.svg())


class _Picture:
    """Turns times into coordinates, and events into shapes."""

    def __init__(self, outcome: Outcome) -> None:
        self._outcome = outcome
        attempts = [one for request in outcome.requests for one in request.attempts]
        self._begin = min(one.asked for one in attempts)
        end = max([one.ended for one in attempts] + [mark.at for mark in outcome.marks])
        self._scale = WIDTH / max(end - self._begin, 1e-3)
        self._span = max(end - self._begin, 1e-3)
        names = sorted({one.prefiller for one in attempts})
        self.colours = dict(zip(names, itertools.cycle(COLOURS), strict=False))

    def svg(self) -> str:
        rows = len(self._outcome.requests)
        height = TOP + rows * ROW + 30
        shapes = itertools.chain(
            self._axis(height),
            *(self._row(at, request) for at, request in enumerate(self._outcome.requests)),
            self._marks(height),
        )
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{LEFT + WIDTH + 40}" '
            f'height="{height}">\n' + "\n".join(shapes) + "\n</svg>"
        )

    def _x(self, at: float) -> float:
        return LEFT + (at - self._begin) * self._scale

    def _axis(self, height: int) -> Iterator[str]:
        for tick in range(TICKS + 1):
            seconds = self._span * tick / TICKS
            x = LEFT + WIDTH * tick / TICKS
            yield (
                f'<line x1="{x:.1f}" y1="{TOP}" x2="{x:.1f}" y2="{height - 24}" stroke="#e4e4e4"/>'
                f'<text x="{x:.1f}" y="{height - 8}" text-anchor="middle">{seconds:.1f} s</text>'
            )

    def _marks(self, height: int) -> Iterator[str]:
        for number, mark in enumerate(self._outcome.marks):
            x = self._x(mark.at)
            y = 20 + number % 4 * 18
            colour = self.colours.get(mark.engine, "#000")
            yield (
                f'<line x1="{x:.1f}" y1="{y}" x2="{x:.1f}" y2="{height - 24}" stroke="{colour}" '
                f'stroke-width="1.5" stroke-dasharray="4 3"/>'
                f'<text x="{x + 4:.1f}" y="{y + 8}">{html.escape(mark.text)}</text>'
            )

    def _row(self, at: int, request: Request) -> Iterator[str]:
        top = TOP + at * ROW
        last = request.attempts[-1]
        verdict = "" if request.equal else " WRONG"
        text = (
            f"{request.number}: {len(request.prompt)} tokens, {last.prefiller} → "
            f"{last.decoder}{verdict}"
        )
        yield f'<text x="4" y="{top + BAR + 4}">{html.escape(text)}</text>'
        for attempt in request.attempts:
            yield from self._computed(top, attempt)
            yield from self._landed(top + BAR + 2, attempt)

    def _computed(self, top: int, attempt: Attempt) -> Iterator[str]:
        colour = self.colours[attempt.prefiller]
        for first, last, times in attempt.chunks:
            for layer, (begin, end) in enumerate(itertools.pairwise(times)):
                text = f"{attempt.prefiller}: tokens {first}-{last - 1}, layer {layer}"
                yield self._box(begin, end, top, BAR, colour, text, 0.55 + 0.45 * (layer % 2))

    def _landed(self, top: int, attempt: Attempt) -> Iterator[str]:
        total = attempt.pages
        edges = [*attempt.samples, (attempt.landed or attempt.ended, total)]
        for (begin, pages), (end, _) in itertools.pairwise(edges):
            high = BAR * pages / total
            text = f"{attempt.decoder}: {pages} of {total} pages"
            yield self._box(begin, end, top + BAR - high, high, LANDED, text)
        if attempt.landed:
            text = f"{attempt.decoder}: generates"
            yield self._box(attempt.landed, attempt.ended, top + BAR / 3, BAR / 3, DECODE, text)
        if attempt.failed:
            x, y = self._x(attempt.ended), top + BAR / 2
            told = html.escape(f"{attempt.name}: {attempt.failed} {attempt.detail}")
            yield (
                f'<path d="M{x - 4:.1f} {y - 4:.1f}l8 8m0-8l-8 8" stroke="#d00" stroke-width="2">'
                f"<title>{told}</title></path>"
                f'<line x1="{self._x(attempt.asked):.1f}" y1="{y:.1f}" x2="{x - 4:.1f}" '
                f'y2="{y:.1f}" stroke="#d00" stroke-dasharray="2 3"/>'
            )

    def _box(
        self, begin: float, end: float, top: float, high: float, colour: str, text: str,
        opacity: float = 1.0,
    ) -> str:  # fmt: skip
        x, width = self._x(begin), max((end - begin) * self._scale, 0.6)
        title = f"<title>{html.escape(text)}</title>"
        return (
            f'<rect x="{x:.2f}" y="{top:.1f}" width="{width:.2f}" height="{high:.1f}" '
            f'fill="{colour}" fill-opacity="{opacity:.2f}">{title}</rect>'
        )
