# SPDX-License-Identifier: Apache-2.0
"""Runs a script in one guest or two: ``python tests/vm/run.py [--guests 2] SCRIPT``.

Each guest runs it with bash in the tree, with ROLE (1 or 2), PEER and OUT in its environment. What
is printed is printed here; files in $OUT come back to the folder of --out, in guest1 and guest2.
The exit status is the first that is not 0, and 3 when the guests themselves failed.
"""

from __future__ import annotations

import contextlib
import shutil
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import click

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from vm import image  # the path comes first
from vm.errors import VmError
from vm.guest import RUN_S, Finished, Guest, Machine
from vm.pair import Pair

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

TROUBLE = 3


@contextlib.contextmanager
def guests(
    count: int,
    *,
    nics: int = 1,
    cpus: int = 2,
    memory_mib: int = 2048,
    rxe: bool = True,
    environment: Mapping[str, str] | None = None,
) -> Iterator[list[Guest]]:
    """Boots guests for a block, for whoever has no fixture.

    Args:
        count: One, on whose card nothing is, or two, which are joined.
        nics: Links between two.
        cpus: Processors of each.
        memory_mib: Memory of each.
        rxe: Whether their kernels have soft-RoCE.
        environment: What each process in them finds in its environment.

    Raises:
        Unavailable: There can be none here; the text says what to install.
        VmError: They do not boot.
    """
    built = image.ensure()
    folder = Path(tempfile.mkdtemp(prefix="tfd-vm-"))
    try:
        if count == 1:
            machine = Machine(
                cpus=cpus, memory_mib=memory_mib, rxe=rxe, environment=environment or {}
            )
            with Guest(built, machine, folder) as guest:
                yield [guest]
        else:
            with Pair(
                built,
                folder,
                nics=nics,
                cpus=cpus,
                memory_mib=memory_mib,
                rxe=rxe,
                environment=environment,
            ) as pair:
                yield pair.guests
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def run_in(
    machines: Sequence[Guest], script: Path, arguments: Sequence[str], timeout_s: float
) -> list[Finished]:
    """Runs a script in each guest at the same time.

    Args:
        machines: Where.
        script: Its path, in the tree or elsewhere; what it is when the guests booted.
        arguments: Its arguments.
        timeout_s: Bound on each.

    Returns:
        How each ended, in the guests' order.

    Raises:
        CommandTimeout: One was not done in time.
        GuestDied: A guest ended.
    """
    command = ["/bin/bash", str(script.resolve()), *arguments]
    processes = [machine.spawn(command) for machine in machines]
    return [process.wait(timeout_s) for process in processes]


def collect(machines: Sequence[Guest], out: Path) -> None:
    """Copies what is in each guest's $OUT to a folder of its own below this one."""
    for machine in machines:
        shutil.copytree(machine.out, out / f"guest{machine.machine.role}", dirs_exist_ok=True)


@click.command()
@click.option("--guests", "count", type=click.IntRange(1, 2), default=1, show_default=True)
@click.option("--nics", type=click.IntRange(1, 2), default=1, show_default=True)
@click.option("--cpus", type=click.IntRange(1), default=2, show_default=True)
@click.option("--memory", "memory_mib", metavar="MIB", type=int, default=2048, show_default=True)
@click.option("--without-rxe", is_flag=True, help="A kernel without soft-RoCE.")
@click.option("--timeout", "timeout_s", metavar="S", type=float, default=RUN_S, show_default=True)
@click.option(
    "--out", type=click.Path(path_type=Path, file_okay=False), help="Gets what is in $OUT."
)
@click.argument("script", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.argument("arguments", nargs=-1)
def main(
    count: int,
    nics: int,
    cpus: int,
    memory_mib: int,
    without_rxe: bool,
    timeout_s: float,
    out: Path | None,
    script: Path,
    arguments: tuple[str, ...],
) -> None:
    """Runs SCRIPT in one guest or in two at once."""
    rxe = not without_rxe
    try:
        with guests(count, nics=nics, cpus=cpus, memory_mib=memory_mib, rxe=rxe) as machines:
            try:
                ended = run_in(machines, script, arguments, timeout_s)
            finally:
                if out is not None:
                    collect(machines, out)
    except VmError as error:
        click.echo(str(error), err=True)
        sys.exit(TROUBLE)
    for number, finished in enumerate(ended, start=1):
        if count > 1:
            click.echo(f"--- guest {number}: status {finished.status}")
        click.echo(finished.stdout, nl=False)
        click.echo(finished.stderr, nl=False, err=True)
    sys.exit(next((finished.status for finished in ended if finished.status), 0) & 0xFF)


if __name__ == "__main__":
    main(prog_name="run.py")
