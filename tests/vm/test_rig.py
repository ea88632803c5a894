# SPDX-License-Identifier: Apache-2.0
"""The rig itself: what fails in a guest fails here, what hangs is bounded, what dies is noticed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from typing import TYPE_CHECKING

import pytest

from support.waiting import eventually
from vm import inner
from vm.errors import CommandFailed, CommandTimeout, GuestDied, VmError
from vm.guest import SHARE, Guest, Machine
from vm.image import ROOT
from vm.pair import address

if TYPE_CHECKING:
    from pathlib import Path

    from vm.image import Image
    from vm.pair import Pair

pytestmark = pytest.mark.long

NO_CONFIG = ("-c", "/dev/null", "--rootdir", SHARE)
NO_PLUGINS = {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}  # their imports take half a minute


def inner_test(guest: Guest, source: str) -> str:
    """Writes a test where the guest sees it; its path there."""
    (guest.share / "test_inner.py").write_text(textwrap.dedent(source))
    return f"{SHARE}/test_inner.py"


def test_a_command(guest: Guest) -> None:
    finished = guest.run("pwd; echo $ROLE $WORD; echo no >&2", env={"WORD": "a b"})
    assert finished.stdout == f"{ROOT}\n1 a b\n"
    assert finished.stderr == "no\n"
    with pytest.raises(CommandFailed, match=r"status 3\n(?s:.*)because"):
        guest.run("echo because; exit 3")
    with pytest.raises(CommandFailed, match=r"status 127(?s:.*)/no/such"):
        guest.run(["/no/such"])
    assert guest.run("kill -9 $$", check=False).status == -signal.SIGKILL


def test_the_device(guest: Guest) -> None:
    assert "link rxe0/1 state ACTIVE" in guest.run("rdma link").stdout
    assert "active_mtu:\t\t4096" in guest.run("ibv_devinfo -d rxe0").stdout


def test_a_kernel_without_rxe(guest_without_rxe: Guest) -> None:
    assert guest_without_rxe.run("rdma link").stdout == ""
    assert guest_without_rxe.run("rdma link add rxe0 type rxe netdev d0", check=False).status != 0
    assert "No IB devices" in guest_without_rxe.run("ibv_devices; ibv_devinfo", check=False).stderr


def test_files_come_back(guest: Guest) -> None:
    guest.run("head -c 300000 /dev/zero > $OUT/zeros; mkdir -p $OUT/a; echo x > $OUT/a/b")
    assert (guest.out / "zeros").read_bytes() == bytes(300_000)
    assert (guest.out / "a" / "b").read_text() == "x\n"


def test_the_tree_is_read_only(guest: Guest, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("host")
    guest.run(f"echo guest > {tmp_path}/file; grep guest {tmp_path}/file; touch {ROOT}/new")
    assert (tmp_path / "file").read_text() == "host"
    assert not (ROOT / "new").exists()


def test_processes_in_the_background(guest: Guest) -> None:
    process = guest.spawn("trap 'echo bye; exit 4' TERM; echo hello; while :; do sleep 0.1; done")
    eventually(lambda: process.stdout == "hello\n", "its output is seen while it runs")
    assert process.running
    process.signal(signal.SIGTERM)
    assert process.wait().status == 4
    assert process.stdout == "hello\nbye\n"


def test_a_hanging_command_is_killed(guest: Guest) -> None:
    with pytest.raises(CommandTimeout, match=r"not done within 0\.5 s(?s:.*)before it hung"):
        guest.run("echo before it hung; sleep 1000", timeout_s=0.5)
    assert guest.run("pgrep -c 'sleep' || true").stdout == "0\n"


def test_programs(guest: Guest) -> None:
    inner.run_program(guest, "client_submit")
    with pytest.raises(inner.InnerFailure, match="no_such_provider"):
        inner.run_program(guest, "core_write", env={"TFD_TEST_PROVIDER": "no_such_provider"})


def test_a_selection_of_pytest(guest: Guest) -> None:
    tests = inner.run_pytest(guest, "tests/unit/test_descriptor.py", "-k", "not hypothesis")
    assert tests
    assert {test.outcome for test in tests} == {"passed"}


def test_inner_failures_are_failures(guest: Guest) -> None:
    path = inner_test(
        guest,
        """
        def test_good():
            pass

        def test_bad():
            seven = 7
            assert seven == 8, "as it has to be"
        """,
    )
    with pytest.raises(inner.InnerFailure, match=r"1 of 2 tests failed(?s:.*)as it has to be"):
        inner.run_pytest(guest, *NO_CONFIG, path, env=NO_PLUGINS)
    with pytest.raises(inner.InnerFailure, match="no test passed"):
        inner.run_pytest(guest, *NO_CONFIG, path, "-k", "nothing", env=NO_PLUGINS)


def test_inner_hang_is_bounded(guest: Guest) -> None:
    path = inner_test(guest, "import time\ndef test_hang():\n    time.sleep(1000)\n")
    with pytest.raises(CommandTimeout, match="not done within 3 s"):
        inner.run_pytest(guest, *NO_CONFIG, path, env=NO_PLUGINS, timeout_s=3)


def test_a_panic_is_told_with_the_console(guest_without_rxe: Guest) -> None:
    loud = "echo 1 > /proc/sys/kernel/sysrq; echo 7 > /proc/sys/kernel/printk"
    with pytest.raises(GuestDied, match="sysrq: Trigger a crash"):
        guest_without_rxe.run(f"{loud}; echo c > /proc/sysrq-trigger")


def perftest(pair: Pair, *options: str) -> None:
    """Writes from guest 2 to guest 1 by RDMA."""
    command = ["ib_write_bw", "-d", "rxe0", "-x", "1", "-s", "65536", "-n", "100", "-F", *options]
    server = pair[1].spawn(command)
    eventually(lambda: ":18515" in pair[1].run("ss -ltn").stdout, "the server waits")
    pair[2].run([*command, address(1)])
    assert server.wait().status == 0, server.text()


def test_two_hosts_and_a_new_one(pair: Pair) -> None:
    """The death of a host is noticed here and silence there; a new one takes its place."""
    perftest(pair)
    process = pair[2].spawn("echo alive; sleep 1000")
    eventually(lambda: process.stdout, "it runs")
    os.kill(pair[2].pid, signal.SIGKILL)
    with pytest.raises(GuestDied, match="host2 has ended"):
        process.wait()
    assert process.stdout == "alive\n"
    with pytest.raises(GuestDied):
        pair[2].run("true")
    pair.boot()
    perftest(pair)


def test_guests_die_with_their_run(vm_image: Image, tmp_path: Path) -> None:
    """A run that is killed leaves no QEMU, even while it boots."""
    program = textwrap.dedent(
        f"""
        import sys, time
        from pathlib import Path
        from vm.guest import Guest, Machine
        from vm.image import Image
        guest = Guest(Image(Path({str(vm_image.kernel)!r}), Path({str(vm_image.initrd)!r})),
                      Machine(memory_mib=512), Path({str(tmp_path)!r}))
        guest.start()
        print(guest.pid, flush=True)
        time.sleep(1000)
        """
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "tests")}
    with subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, env=environment
    ) as run:
        assert run.stdout is not None
        pid = int(run.stdout.readline())
        eventually(lambda: qemu_runs(pid), "QEMU runs")
        run.kill()
    eventually(lambda: not qemu_runs(pid), "QEMU is gone")


def qemu_runs(pid: int) -> bool:
    """Tells whether a process is a QEMU that lives."""
    try:
        with open(f"/proc/{pid}/stat") as stat:
            name, state = stat.read().rpartition(")")[::2]
    except FileNotFoundError:
        return False
    return "qemu" in name and state.split()[0] != "Z"


def test_a_boot_is_bounded(vm_image: Image, tmp_path: Path) -> None:
    guest = Guest(vm_image, Machine(memory_mib=512), tmp_path)
    with pytest.raises(VmError, match=r"no boot within 0\.2 s"):
        guest.boot(timeout_s=0.2)
    assert not guest.alive
