# SPDX-License-Identifier: Apache-2.0
"""The command ``transferd demo``."""

from __future__ import annotations

import dataclasses
import json
import sys

import click
from rich.console import Console

from transferd.client import errors
from transferd.client.demo import raw, weights

DEMOS = ("weights",)
ROUNDS = 3


@click.command("transferd demo")
@click.argument("demo", type=click.Choice(DEMOS), default=DEMOS[0])
@click.option(
    "--rounds",
    type=click.IntRange(1, 1000),
    default=ROUNDS,
    show_default=True,
    help="How often the model is sent.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON for programs.")
def command(demo: str, rounds: int, as_json: bool) -> None:
    """Moves a real model's weights between two processes through two daemons, and checks it.

    Exit status 0: every check passed.
    """
    del demo  # there is one
    console = Console(highlight=False, stderr=as_json)
    outcome = weights.run(console, rounds, raw.gbps)
    if as_json:
        print(json.dumps({**dataclasses.asdict(outcome), "good": outcome.good}, indent=2))
    else:
        weights.show(console, outcome)
    if not outcome.good:
        sys.exit(1)


def main() -> None:
    """Runs the command line; errors are said in a sentence, with exit status 1."""
    try:
        command(standalone_mode=True)
    except errors.TransferdError as error:
        click.echo(f"transferd demo: {error}", err=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
