# SPDX-License-Identifier: Apache-2.0
"""The command ``transferd demo``."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import sys
from pathlib import Path

import click
from rich.console import Console

from transferd.client import errors
from transferd.client.demo import raw, weights

DEMOS = ("weights", "kv")
ROUNDS = 3
REQUESTS = 24
LEAST = 6  # requests: two thirds come before a prefiller is killed, one third after


@click.command("transferd demo")
@click.argument("demo", type=click.Choice(DEMOS), default=DEMOS[0])
@click.option(
    "--rounds",
    type=click.IntRange(1, 1000),
    default=ROUNDS,
    show_default=True,
    help="weights: how often the model is sent.",
)
@click.option(
    "--requests",
    type=click.IntRange(LEAST, 200),
    default=REQUESTS,
    show_default=True,
    help="kv: prompts.",
)
@click.option(
    "--timeline",
    type=click.Path(dir_okay=False, writable=True, path_type=Path),
    help="kv: writes a picture of layers computed and pages landed, an HTML file.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON for programs.")
def command(demo: str, rounds: int, requests: int, timeline: Path | None, as_json: bool) -> None:
    r"""Moves real data between processes through two daemons, and checks it.

    \b
    weights  a real model's weights, from one process to another
    kv       KV caches from two prefillers to two decoders; a prefiller is killed
             in the middle, another one joins

    Exit status 0: every check passed.
    """
    console = Console(highlight=False, stderr=as_json)
    if demo == "kv":
        good = _kv(console, requests, timeline, as_json)
    else:
        good = _weights(console, rounds, as_json)
    if not good:
        sys.exit(1)


def _weights(console: Console, rounds: int, as_json: bool) -> bool:
    outcome = weights.run(console, rounds, raw.gbps)
    if as_json:
        print(json.dumps({**dataclasses.asdict(outcome), "good": outcome.good}, indent=2))
    else:
        weights.show(console, outcome)
    return outcome.good


def _kv(console: Console, requests: int, timeline: Path | None, as_json: bool) -> bool:
    if importlib.util.find_spec("numpy") is None:
        raise errors.NotFound("numpy missing; install with: pip install 'transferd[demo]'")
    from transferd.client.demo import kv, kvrecord, kvtimeline

    if timeline is not None and not timeline.parent.is_dir():
        raise errors.NotFound(f"--timeline: there is no folder {timeline.parent}")
    outcome = kv.run(console, requests)
    if timeline is not None:
        kvtimeline.write(timeline, outcome)
        console.print(f"  timeline: {timeline}")
    if as_json:
        print(json.dumps(outcome.summary(), indent=2))
    else:
        kvrecord.show(console, outcome)
    return outcome.good


def main() -> None:
    """Runs the command line; errors are said in a sentence, with exit status 1."""
    try:
        command(standalone_mode=True)
    except errors.TransferdError as error:
        click.echo(f"transferd demo: {error}", err=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
