# SPDX-License-Identifier: Apache-2.0
"""Fixtures of all tests."""

from __future__ import annotations

import faulthandler
import random
import shutil
import signal
import tempfile
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import pytest
from _pytest.faulthandler import fault_handler_stderr_fd_key  # captured output has another

from support.daemon import DaemonProcess, shared_memory_names
from support.providers import PROVIDERS

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator

TESTS = Path(__file__).parent
# A layer whose tests all vanished or were skipped has proved nothing.
LAYERS = ("unit", "protocol", "integration", "chaos", "conformance", "vm")

passed_by_layer = pytest.StashKey[Counter[str]]()


class MakeDaemon(Protocol):
    """Makes further daemons; they are stopped and checked when the test ends."""

    def __call__(self, **overrides: Any) -> DaemonProcess:
        """Starts a daemon whose configuration has these keys replaced."""
        ...


def pytest_addoption(parser: pytest.Parser) -> None:
    """Adds our options."""
    parser.addoption(
        "--require-layers",
        action="store_true",
        help="fail when a layer (a folder of tests/) ran no test",
    )
    parser.addoption(
        "--require-provider",
        action="append",
        default=[],
        choices=[provider.name for provider in PROVIDERS],
        help="fail tests/conformance where this host cannot run that provider, "
        "instead of leaving it out",
    )
    parser.addoption(
        "--without-vm",
        metavar="REASON",
        default="",
        help="skip what runs in guests (tests/vm) for this reason; the layer is not required then",
    )
    parser.addoption(
        "--seed", type=int, default=None, help="seed of the `seeded` fixture; default: random"
    )


def pytest_configure(config: pytest.Config) -> None:
    """Chooses the seed; sees to it that the processes of tests hear Ctrl-C."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as a shell's background jobs have it
        signal.signal(signal.SIGINT, signal.default_int_handler)
    config.stash[passed_by_layer] = Counter()
    if config.option.seed is None:
        config.option.seed = random.SystemRandom().randrange(1 << 32)


def pytest_report_header(config: pytest.Config) -> str:
    """Prints the seed, so that a failure can be repeated."""
    return f"transferd: --seed={config.option.seed}"


@pytest.hookimpl(wrapper=True, trylast=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """Has the stacks of a hanging test printed when its own time is nearly over.

    The plugin, whose wrapper is around this one, knows one time for all tests. One with more of it
    (a guest's boot alone may take minutes on a busy machine) is slow then, and does not hang.
    """
    after_s, limit_s = (float(item.config.getini(f"{k}timeout")) for k in ("faulthandler_", ""))
    mark = item.get_closest_marker("timeout")
    if after_s and limit_s and mark is not None:
        stderr = item.config.stash[fault_handler_stderr_fd_key]
        faulthandler.dump_traceback_later(mark.args[0] * after_s / limit_s, file=stderr)
    return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Any:
    """Counts the layers' tests, and attaches the daemons' logs to a failure."""
    report = yield
    if report.when == "call" and report.passed:
        item.config.stash[passed_by_layer][item.path.relative_to(TESTS).parts[0]] += 1
    if report.failed:
        for daemon in getattr(item, "transferd_daemons", []):
            report.sections.append((f"log of {daemon.directory.name}", daemon.log()[-20_000:]))
    return report


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Fails the run when a required layer proved nothing."""
    if not session.config.option.require_layers or session.config.option.collectonly:
        return
    passed = session.config.stash[passed_by_layer]
    required = [layer for layer in LAYERS if layer != "vm" or not session.config.option.without_vm]
    empty = [
        layer for layer in required if any((TESTS / layer).glob("test_*.py")) and not passed[layer]
    ]
    if empty:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
        reporter = session.config.pluginmanager.get_plugin("terminalreporter")
        if reporter is not None:
            reporter.write_line(f"no test passed in: {', '.join(empty)}", red=True)


@pytest.fixture
def seeded(request: pytest.FixtureRequest) -> random.Random:
    """Gives a random generator whose seed is printed."""
    return random.Random(request.config.option.seed)


@pytest.fixture
def short_tmp() -> Iterator[Path]:
    """Gives a directory with a path so short that a socket fits in (108 bytes)."""
    directory = Path(tempfile.mkdtemp(prefix="tfd-"))
    yield directory
    shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture
def make_daemon(request: pytest.FixtureRequest, short_tmp: Path) -> Iterator[MakeDaemon]:
    """Starts daemons with a configuration of the test's own."""
    before = shared_memory_names()
    daemons: list[DaemonProcess] = []
    request.node.transferd_daemons = daemons

    def make(**overrides: Any) -> DaemonProcess:
        directory = short_tmp / f"daemon{len(daemons)}"
        directory.mkdir()
        daemon = DaemonProcess(directory, overrides)
        daemons.append(daemon)
        return daemon.start()

    yield make
    problems: list[Exception | AssertionError] = []
    for daemon in reversed(daemons):
        try:
            daemon.__exit__(None, None, None)
        except (AssertionError, RuntimeError) as error:
            problems.append(error)
    if problems:
        raise ExceptionGroup("daemons did not end well", [Exception(str(p)) for p in problems])
    leaked = shared_memory_names() - before
    assert not leaked, f"shared memory was left behind: {leaked}"


@pytest.fixture
def daemon(make_daemon: MakeDaemon) -> DaemonProcess:
    """Gives one running daemon."""
    return make_daemon()


@pytest.fixture
def daemon_pair(make_daemon: MakeDaemon) -> tuple[DaemonProcess, DaemonProcess]:
    """Gives two running daemons that can reach each other."""
    return make_daemon(), make_daemon()
