# SPDX-License-Identifier: Apache-2.0
"""One guest: its QEMU, and the processes that the host starts in it.

A guest belongs to the thread that started it: the kernel kills its QEMU when that thread ends, so
that no guest outlives its run, however that ends.
"""

from __future__ import annotations

import base64
import json
import os
import select
import shlex
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vm import needs
from vm.errors import CommandFailed, CommandTimeout, GuestDied, VmError
from vm.image import ROOT

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from types import TracebackType

    from vm.image import Image

AGENT = Path(__file__).with_name("agent.py")
SHARE = "/run/vm"  # the shared folder, as the guest sees it
BOOT_S = 180.0  # alone it takes 7 s; machines may be busy
RUN_S = 120.0
KILL_S = 20.0  # from SIGKILL in the guest to the news of it
TAIL = 4000
# Of the frame that the NICs carry: with it the MTU of RDMA is 4096, the largest.
MTU = 4200


@dataclass(frozen=True, slots=True)
class Nic:
    """A network card of a guest, whose other end is a socket of another QEMU.

    Attributes:
        mac: Its address.
        address: IPv4 address and length of the prefix.
        local: Unix socket that it receives at.
        remote: Unix socket that it sends to; nothing has to be there.
    """

    mac: str
    address: str
    local: Path
    remote: Path


@dataclass(frozen=True, slots=True)
class Machine:
    """What a guest is made of.

    Attributes:
        name: Its host name.
        role: Number of the guest, as scripts see it in ROLE.
        nics: eth0, eth1, …; without any there is d0, a card that leads nowhere.
        cpus: Processors.
        memory_mib: Memory.
        rxe: Whether the kernel has soft-RoCE, and rxe0, rxe1, … are on the cards.
        environment: What each process in the guest finds in its environment.
    """

    name: str = "guest"
    role: int = 1
    nics: tuple[Nic, ...] = ()
    cpus: int = 2
    memory_mib: int = 2048
    rxe: bool = True
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Finished:
    """How a command ended.

    Attributes:
        status: Exit status; minus the number of the signal that ended it.
        stdout: What it printed.
        stderr: What it complained about.
    """

    status: int
    stdout: str
    stderr: str


class Process:
    """A process of a guest."""

    def __init__(self, guest: Guest, number: int, what: str) -> None:
        self.guest = guest
        self.number = number
        self.what = what
        self.status: int | None = None
        self.error = ""
        self.on_output: Callable[[bytes], None] | None = None

    @property
    def running(self) -> bool:
        """Whether it has not ended, as far as the guest has told."""
        self.guest.look()
        return self.status is None

    @property
    def stdout(self) -> str:
        """What it has printed so far; also after the guest's death."""
        return self._read("out")

    @property
    def stderr(self) -> str:
        """What it has complained about so far."""
        return self._read("err")

    def _read(self, stream: str) -> str:
        path = self.guest.output_file(self.number, stream)
        return path.read_text(errors="replace") if path.exists() else ""

    def text(self) -> str:
        """Both streams, for a failure."""
        return f"--- {self.what}\n{self.stdout}{self.stderr}{self.error}"

    def signal(self, which: int = signal.SIGTERM) -> None:
        """Signals it and what it has started."""
        self.guest.tell(op="signal", id=self.number, signal=int(which))

    def type(self, data: bytes) -> None:
        """Types into its terminal."""
        self.guest.tell(op="input", id=self.number, data=base64.b64encode(data).decode())

    def resize(self, rows: int, columns: int) -> None:
        """Changes the size of its terminal."""
        self.guest.tell(op="resize", id=self.number, rows=rows, columns=columns)

    def kill(self) -> None:
        """Kills it, as a crash would, and waits until it is gone."""
        self.signal(signal.SIGKILL)
        self.guest.pump_until(lambda: self.status is not None, KILL_S, f"end of {self.what}")

    def wait(self, timeout_s: float = RUN_S) -> Finished:
        """Waits for its end.

        Args:
            timeout_s: Bound; it is killed after that, and its guest too if that takes no effect.

        Raises:
            CommandTimeout: It was not done in time.
            GuestDied: The guest has ended before it.
        """
        if self.guest.pump(lambda: self.status is not None, timeout_s):
            assert self.status is not None
            return Finished(self.status, self.stdout, self.stderr + self.error)
        self.signal(signal.SIGKILL)
        hung = not self.guest.pump(lambda: self.status is not None, KILL_S)
        after = ""
        if hung:
            self.guest.kill()
            after = f"; nor was SIGKILL obeyed, the guest was killed\n{self.guest.console_tail()}"
        raise CommandTimeout(
            f"{self.guest.name}: not done within {timeout_s:g} s{after}\n{self.text()[-TAIL:]}"
        )


class Guest:
    """A virtual machine that runs the host's tree."""

    def __init__(self, image: Image, machine: Machine, folder: Path) -> None:
        """Prepares a guest; :meth:`start` starts it.

        Args:
            image: What it boots.
            machine: What it is made of.
            folder: A folder of its own: console, logs, and the folder that it shares.
        """
        self.image = image
        self.machine = machine
        self.folder = folder
        self.share = folder / "share"
        self._qemu: subprocess.Popen[bytes] | None = None
        self._channel: socket.socket | None = None
        self._pending = b""
        self._ready = False
        self._numbers = 0
        self._processes: dict[int, Process] = {}

    # ---- life ----

    @property
    def name(self) -> str:
        """Its host name."""
        return self.machine.name

    @property
    def out(self) -> Path:
        """The folder that scripts find as $OUT, on this side."""
        return self.share / "out"

    @property
    def alive(self) -> bool:
        """Whether its QEMU runs."""
        return self._qemu is not None and self._qemu.poll() is None

    @property
    def pid(self) -> int:
        """Process id of its QEMU."""
        assert self._qemu is not None, "the guest was not started"
        return self._qemu.pid

    def start(self) -> Guest:
        """Starts QEMU; :meth:`wait_ready` waits for the guest."""
        for folder in (self.share, self.out, self.share / "processes"):
            folder.mkdir(parents=True, exist_ok=True)
        (self.share / "start").write_text(start_script(self.machine))
        ours, theirs = socket.socketpair()
        setpriv = needs.program("setpriv")
        assert setpriv is not None
        with theirs, (self.folder / "qemu.log").open("wb") as log:
            self._qemu = subprocess.Popen(
                # It dies with us, also when we are killed; Ctrl-C is ours to handle.
                [setpriv, "--pdeathsig", "KILL", "--", *self._command(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )
        self._channel = ours
        return self

    def _command(self, channel_fd: int) -> list[str]:
        qemu = needs.program("qemu-system-x86_64")
        assert qemu is not None
        machine = self.machine
        append = "console=ttyS0 quiet panic=-1 rdinit=/init mitigations=off"
        # Else guests of several processors read the time from an emulated HPET: 5 us, not 50 ns.
        append += " tsc=reliable"
        # Else it panics in setup_IO_APIC unless 5 ticks of the timer come within 40e9/HZ cycles of
        # the TSC (160e6, under 0.1 s), which is the host's: QEMU may not get to run in time. The
        # check is meant for boards that are wired wrongly; on KVM Linux itself leaves it out.
        append += " no_timer_check"
        if not machine.rxe:
            append += " without=rdma_rxe"
        command = [qemu, "-nodefaults", "-no-user-config", "-no-reboot", "-display", "none"]
        command += ["-accel", os.environ.get("TRANSFERD_VM_ACCEL", "tcg,thread=multi")]
        # A place for a second processor: of a guest that can have but one, QEMU before 8.1 leaves
        # out every memory barrier, and virtio's queues, which are shared with threads of QEMU's
        # own, lose a kick now and then: a card stands still for good (QEMU c914d46d0a64).
        smp = f"{machine.cpus},maxcpus={max(machine.cpus, 2)}"
        command += ["-cpu", "max", "-smp", smp, "-m", str(machine.memory_mib)]
        command += ["-kernel", str(self.image.kernel), "-initrd", str(self.image.initrd)]
        command += ["-append", append, "-serial", f"file:{_escaped(self.folder / 'console.log')}"]
        command += ["-virtfs", "local,path=/,mount_tag=host,security_model=none,readonly=on,"
                    "multidevs=remap"]  # fmt: skip
        command += ["-virtfs", f"local,path={_escaped(self.share)},mount_tag=share,"
                    "security_model=none"]  # fmt: skip
        command += ["-device", "virtio-serial-pci", "-chardev", f"socket,id=agent,fd={channel_fd}"]
        command += ["-device", "virtserialport,chardev=agent,name=agent"]
        for number, nic in enumerate(machine.nics):
            command += ["-netdev", f"dgram,id=n{number},local.type=unix,local.path={nic.local},"
                        f"remote.type=unix,remote.path={nic.remote}"]  # fmt: skip
            # Merged buffers stall a card for ever, too: QEMU before 9.1 waits for a kick that has
            # come already when the guest added buffers, too few for the packet, while it looked.
            command += ["-device", f"virtio-net-pci,netdev=n{number},mac={nic.mac},"
                        f"mrg_rxbuf=off,host_mtu={MTU},romfile="]  # fmt: skip
        return command

    def wait_ready(self, timeout_s: float = BOOT_S) -> Guest:
        """Waits until it takes commands.

        Raises:
            VmError: Not in time; the guest was killed, and the text has the end of its console.
            GuestDied: It ended.
        """
        if not self.pump(lambda: self._ready, timeout_s):
            self.kill()
            raise VmError(f"{self.name}: no boot within {timeout_s:g} s\n{self.console_tail()}")
        return self

    def boot(self, timeout_s: float = BOOT_S) -> Guest:
        """Starts it and waits until it takes commands; raises as :meth:`wait_ready` does."""
        return self.start().wait_ready(timeout_s)

    def kill(self) -> None:
        """Kills its QEMU, as a loss of power would."""
        if self._qemu is not None:
            self._qemu.kill()
            self._qemu.wait()
        if self._channel is not None:
            self._channel.close()
            self._channel = None

    def __enter__(self) -> Guest:
        """Boots it unless it runs."""
        return self if self.alive else self.boot()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Ends it: what it has that is worth keeping is in the shared folder."""
        self.kill()

    def console(self) -> str:
        """What its kernel and init have printed."""
        path = self.folder / "console.log"
        return path.read_text(errors="replace") if path.exists() else ""

    @property
    def card_stalled(self) -> bool:
        """Whether its kernel waits for ever for a card: QEMU's fault, see :meth:`_command`."""
        return "NETDEV WATCHDOG" in self.console()

    def console_tail(self) -> str:
        """The end of the console and of QEMU's own messages, for a failure."""
        log = self.folder / "qemu.log"
        own = log.read_text(errors="replace") if log.exists() else ""
        return f"--- console of {self.name}\n{self.console()[-TAIL:]}\n--- qemu\n{own[-TAIL:]}"

    # ---- processes ----

    def spawn(
        self,
        command: str | Sequence[str],
        *,
        env: Mapping[str, str] | None = None,
        cwd: str | Path = ROOT,
        terminal: tuple[int, int] | None = None,
    ) -> Process:
        """Starts a process and does not wait for it.

        Args:
            command: A line for bash, or a program and its arguments.
            env: Added to the guest's environment.
            cwd: Its folder.
            terminal: Rows and columns of a terminal to run it on; `on_output` gets what it prints.

        Raises:
            GuestDied: The guest has ended.
        """
        argv = ["/bin/bash", "-c", command] if isinstance(command, str) else [*command]
        self._numbers += 1
        process = Process(
            self, self._numbers, command if isinstance(command, str) else " ".join(argv)
        )
        self._processes[process.number] = process
        rows, columns = terminal or (0, 0)
        self.tell(
            op="start",
            id=process.number,
            argv=argv,
            env={**self.machine.environment, **(env or {})},
            cwd=str(cwd),
            stdout=f"{SHARE}/processes/{process.number}.out",
            stderr=f"{SHARE}/processes/{process.number}.err",
            rows=rows,
            columns=columns,
        )
        return process

    def run(
        self,
        command: str | Sequence[str],
        *,
        timeout_s: float = RUN_S,
        check: bool = True,
        env: Mapping[str, str] | None = None,
        cwd: str | Path = ROOT,
    ) -> Finished:
        """Runs a command to its end.

        Args:
            command: A line for bash, or a program and its arguments.
            timeout_s: Bound; see :meth:`Process.wait`.
            check: Whether another exit status than 0 raises.
            env: Added to the guest's environment.
            cwd: Its folder.

        Raises:
            CommandFailed: The status is not 0; the text has what it printed.
            CommandTimeout: It was not done in time.
            GuestDied: The guest has ended.
        """
        process = self.spawn(command, env=env, cwd=cwd)
        finished = process.wait(timeout_s)
        if check and finished.status != 0:
            raise CommandFailed(f"{self.name}: status {finished.status}\n{process.text()[-TAIL:]}")
        return finished

    def output_file(self, number: int, stream: str) -> Path:
        """The file, on this side, that a process prints to."""
        return self.share / "processes" / f"{number}.{stream}"

    # ---- the port ----

    def tell(self, **order: Any) -> None:
        """Sends an order to the agent."""
        if self._channel is None:
            raise GuestDied(f"{self.name} has ended\n{self.console_tail()}")
        try:
            self._channel.sendall(json.dumps(order).encode() + b"\n")
        except OSError:
            self._died()

    def look(self) -> None:
        """Takes what the agent has sent, without waiting."""
        self.pump(lambda: False, 0)

    def pump_until(self, done: Callable[[], bool], timeout_s: float, what: str) -> None:
        """Takes what the agent sends until something is true; VmError if it is not in time."""
        if not self.pump(done, timeout_s):
            raise VmError(f"{self.name}: not within {timeout_s:g} s: {what}\n{self.console_tail()}")

    def pump(self, done: Callable[[], bool], timeout_s: float) -> bool:
        """Takes what the agent sends until something is true.

        Returns:
            Whether it is true; else the time is over.

        Raises:
            GuestDied: The guest ended before.
        """
        deadline = time.monotonic() + timeout_s
        while not done():
            if self._channel is None:
                raise GuestDied(f"{self.name} has ended\n{self.console_tail()}")
            left = deadline - time.monotonic()
            readable, _, _ = select.select([self._channel], [], [], max(left, 0))
            if readable:
                self.receive()
            elif left <= 0:
                return False
        return True

    def fileno(self) -> int:
        """What select can wait for: :meth:`receive` has something to take then."""
        if self._channel is None:
            raise GuestDied(f"{self.name} has ended\n{self.console_tail()}")
        return self._channel.fileno()

    def receive(self) -> None:
        """Takes what the agent has sent; waits if that is nothing.

        Raises:
            GuestDied: The guest has ended.
        """
        assert self._channel is not None
        try:
            data = self._channel.recv(65536)
        except ConnectionResetError:
            data = b""
        if not data:
            self._died()
        *lines, self._pending = (self._pending + data).split(b"\n")
        for line in lines:
            self._take(json.loads(line))

    def _take(self, message: dict[str, Any]) -> None:
        if message["event"] == "ready":
            self._ready = True
            return
        process = self._processes[message["id"]]
        if message["event"] == "exit":
            process.status = message["status"]
            process.error = message.get("error", "")
        elif process.on_output is not None:
            process.on_output(base64.b64decode(message["data"]))

    def _died(self) -> None:
        assert self._qemu is not None
        try:
            status: int | None = self._qemu.wait(KILL_S)
        except subprocess.TimeoutExpired:
            status = None
        self.kill()
        raise GuestDied(f"{self.name} has ended (QEMU's status {status})\n{self.console_tail()}")


def _escaped(path: Path) -> str:
    """A path as QEMU's lists of options take it."""
    return str(path).replace(",", ",,")


def start_script(machine: Machine) -> str:
    """What a guest runs once its files are there: name, addresses, devices, the agent."""
    lines = [
        "# SPDX-License-Identifier: Apache-2.0",
        "set -e",
        f"export PATH={needs.SYSTEM_PATH} HOME=/root LANG=C.UTF-8 OUT={SHARE}/out",
        f"export ROLE={machine.role}",
        "ulimit -l unlimited",
        f"hostname {shlex.quote(machine.name)}",
        "ip link set lo up",
    ]
    if machine.nics:
        cards = [(f"eth{number}", nic.address) for number, nic in enumerate(machine.nics)]
    else:
        cards = [("d0", "10.78.0.1/24")]
        lines.append("ip link add d0 type dummy")
    for number, (card, address) in enumerate(cards):
        lines += [
            f"ip link set {card} mtu {MTU}",
            f"ip address add {address} dev {card}",
            f"ip link set {card} up",
        ]
        if machine.rxe:
            lines.append(f"rdma link add rxe{number} type rxe netdev {card}")
    # By its real path: what stands before it on PATH may be a script that takes seconds here.
    python = Path(sys.executable).resolve()
    lines.append(f"exec {shlex.quote(str(python))} -I -S {shlex.quote(str(AGENT))}")
    return "".join(f"{line}\n" for line in lines)
