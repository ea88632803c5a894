# SPDX-License-Identifier: Apache-2.0
"""Two RoCE hosts to play with: ``deploy/quickstart vm``.

At a terminal: a shell on each. Otherwise a short check that the two can talk, and its output.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import os
import select
import shutil
import signal
import sys
import tempfile
import termios
import tty
from pathlib import Path
from typing import TYPE_CHECKING

import click

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from vm import image  # the path comes first
from vm.daemons import Daemons
from vm.errors import VmError
from vm.guest import SHARE, Process
from vm.image import ROOT
from vm.pair import ROLES, Pair, address

if TYPE_CHECKING:
    from collections.abc import Iterator

SWITCH = b"\x1d"  # Ctrl-]
KEPT = 256  # chunks of output of the shell that is not shown
CHECK_S = 180.0
BIN = Path(sys.executable).parent
# A transfer in an emulated machine takes long.
BENCH = "transferctl bench --to host2:7473 --sizes 4K,64K --iterations 20 --warm-up 2"
HELP = f"""
You are on host1, one of two RoCE hosts. Ctrl-] goes to host2 and back; `exit` in both ends them.
On each runs a daemon. What there is to try:

  rdma link                                   RDMA devices (soft-RoCE on eth0, eth1)
  transferctl rails --why                     those that the daemon uses, and why
  transferctl bench --serve                   on host2, then on host1:
  {BENCH}
  tc qdisc add dev eth0 root netem loss 0.5%  a bad link; `tc qdisc del dev eth0 root` mends it
  ip link set eth1 down                       a rail is lost
  ib_write_bw -d rxe0 -x 1 -F                 the device alone: on host2; on host1 add `host2`
  less {SHARE}/daemon.log                    the daemon's log; transferd.yaml is beside it

All is emulated: commands in Python take 10 s to start. The tree is the real one, and read-only.
"""


class TerminalClosed(VmError):
    """The user's terminal is gone."""


class Screen:
    """A terminal that shows one of several shells; Ctrl-] goes to the next."""

    def __init__(self, shells: dict[str, Process], keyboard: int = 0, screen: int = 1) -> None:
        """Shows the first.

        Args:
            shells: By what they are announced as; each has a terminal of its guest.
            keyboard: File descriptor of the terminal, to read from.
            screen: The same, to write to.
        """
        self._keyboard = keyboard
        self._screen = screen
        self._shells = shells
        self._names = list(shells)
        self._shown = self._names[0]
        self._kept: dict[str, collections.deque[bytes]] = {
            name: collections.deque(maxlen=KEPT) for name in shells
        }
        for name, shell in shells.items():
            shell.on_output = functools.partial(self._take, name)

    def run(self) -> None:
        """Runs until all shells have ended.

        Raises:
            GuestDied: A guest ended.
            TerminalClosed: The terminal was closed.
        """
        before = termios.tcgetattr(self._keyboard)
        try:
            tty.setraw(self._keyboard)
            while living := [name for name in self._names if self._shells[name].status is None]:
                if self._shown not in living:
                    self._show(living[0])
                self._step()
        finally:
            with contextlib.suppress(termios.error):  # its window is gone
                termios.tcsetattr(self._keyboard, termios.TCSADRAIN, before)

    def _step(self) -> None:
        guests = {shell.guest.fileno(): shell.guest for shell in self._shells.values()}
        readable, _, _ = select.select([self._keyboard, *guests], [], [])
        for fd in readable:
            if fd == self._keyboard:
                self._type(self._read())
            else:
                guests[fd].receive()

    def _read(self) -> bytes:
        try:
            data = os.read(self._keyboard, 4096)
        except OSError:  # EIO: its window is gone
            data = b""
        if not data:
            raise TerminalClosed("the terminal was closed")
        return data

    def _type(self, data: bytes) -> None:
        """Passes on what is typed; the switch is ours."""
        for number, part in enumerate(data.split(SWITCH)):
            if number:
                at = self._names.index(self._shown)
                self._show(self._names[(at + 1) % len(self._names)])
            if part and self._shells[self._shown].status is None:
                self._shells[self._shown].type(part)

    def _show(self, name: str) -> None:
        self._shown = name
        self._write(f"\r\n--- {name}\r\n".encode())
        while self._kept[name]:
            self._write(self._kept[name].popleft())

    def _take(self, name: str, data: bytes) -> None:
        if name == self._shown:
            self._write(data)
        else:
            self._kept[name].append(data)

    def _write(self, data: bytes) -> None:
        while data:
            data = data[os.write(self._screen, data) :]

    def resize(self, rows: int, columns: int) -> None:
        """Tells the shells how large the window is now."""
        for shell in self._shells.values():
            if shell.status is None:
                shell.resize(rows, columns)


def window() -> tuple[int, int]:
    """Rows and columns of our terminal."""
    size = shutil.get_terminal_size()
    return size.lines, size.columns


def prepare(pair: Pair, daemons: Daemons) -> None:
    """Gives the hosts each other's names, and their shells what they find by name."""
    names = "".join(f"{address(role)} host{role}\n" for role in ROLES)
    for role in ROLES:
        guest = pair[role]
        (guest.share / "hosts").write_text(names)
        guest.run(f"cat {SHARE}/hosts >> /etc/hosts")
        log = guest.output_file(daemons[role].process.number, "out")
        with contextlib.suppress(FileExistsError):
            (guest.share / "daemon.log").symlink_to(log.relative_to(guest.share))
        (guest.share / "bashrc").write_text(
            f"PATH={BIN}:$PATH\nPS1='{guest.name}:\\w# '\ncd\n"
            + (f"cat {SHARE}/help\n" if role == 1 else "")
        )
        (guest.share / "help").write_text(HELP)


def shells(pair: Pair) -> None:
    """Has the user work in a shell on each host."""
    opened = {
        guest.name: guest.spawn(
            ["/bin/bash", "--rcfile", f"{SHARE}/bashrc", "-i"],
            terminal=window(),
            env={"TERM": os.environ.get("TERM", "linux")},
        )
        for guest in pair.guests
    }
    screen = Screen(opened)
    signal.signal(signal.SIGWINCH, lambda *_: screen.resize(*window()))
    screen.run()


def check(pair: Pair) -> None:
    """Shows that the two can talk.

    Raises:
        VmError: They cannot; the text has the output of what failed.
    """
    one, two = pair.guests
    path = {"PATH": f"{BIN}:/usr/sbin:/usr/bin:/sbin:/bin"}
    server = two.spawn("transferctl bench --serve --once", env=path)
    for command in ("rdma link", "transferctl rails --why", BENCH):
        click.echo(f"host1# {command}")
        click.echo(one.run(command, env=path, timeout_s=CHECK_S).stdout)
    if server.wait(CHECK_S).status != 0:
        raise VmError(server.text())
    click.echo("the two hosts talk to each other")


@contextlib.contextmanager
def scratch() -> Iterator[Path]:
    """Gives a folder for a block; its path is short enough for sockets."""
    folder = Path(tempfile.mkdtemp(prefix="tfd-vm-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@click.command()
@click.option("--nics", type=click.IntRange(1, 2), default=2, show_default=True)
@click.option("--cpus", type=click.IntRange(1), default=1, show_default=True)
@click.option("--memory", "memory_mib", metavar="MIB", type=int, default=1536, show_default=True)
@click.option("--check", "only_check", is_flag=True, help="No shell, also at a terminal.")
def main(nics: int, cpus: int, memory_mib: int, only_check: bool) -> None:
    """Boots two RoCE hosts with daemons, and gives a shell on each."""
    interactive = sys.stdin.isatty() and sys.stdout.isatty() and not only_check
    os.chdir(ROOT)
    try:
        with scratch() as folder:
            click.echo("booting two hosts (10 s) …")
            with Pair(image.ensure(), folder, nics=nics, cpus=cpus, memory_mib=memory_mib) as pair:
                click.echo("starting a daemon on each (30 s) …")
                daemons = Daemons(pair, folder / "tls", rails=None).boot()
                prepare(pair, daemons)
                if interactive:
                    shells(pair)
                else:
                    check(pair)
                    daemons.close()
    except VmError as error:
        click.echo(str(error), err=True)
        sys.exit(1)


if __name__ == "__main__":
    main(prog_name="deploy/quickstart vm")
