# SPDX-License-Identifier: Apache-2.0
"""vLLM engines as processes of their own, for tests/vllm and the benchmark of KV caches."""

from __future__ import annotations

import contextlib
import importlib.metadata
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from support.waiting import eventually

if TYPE_CHECKING:
    from types import TracebackType

    from support.daemon import DaemonProcess

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = ROOT / "tests" / "vllm" / "engine.py"
MODELS = ROOT / "build" / "vllm"
TINY = MODELS / "llama"
HYBRID = MODELS / "hybrid"
START_S = 240.0  # one alone takes 30 s
ANSWER_S = 120.0
GONE_S = 20.0
LOG_SHOWN = 6000
CALM_S = 20.0  # timeout_s where nobody dies, so that a busy machine loses nobody
PREFILL = {"do_remote_decode": True}  # what a prefiller is told of a request
BLOCK_TOKENS = 32  # the CPU build takes multiples of it

# What all engines of tests have in common. Without a distribution of vLLM nobody gets here.
ARGUMENTS: dict[str, Any] = {
    "model": str(TINY),
    "skip_tokenizer_init": True,
    "enforce_eager": True,
    "max_model_len": 1024,
    "dtype": "float32",
    "block_size": BLOCK_TOKENS,
    "num_gpu_blocks_override": 1024,  # 64 MiB: large enough to be adopted in place
    "max_num_batched_tokens": 256,
    "enable_prefix_caching": False,
    "disable_log_stats": False,
}
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    # The worker in the engine's process, as with one GPU: processes that talk by shared memory spin
    # in sched_yield, which keeps everybody else of a small machine waiting for seconds.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
}


def why_not() -> str:
    """Tells why engines cannot run here; empty: they can."""
    for name in ("vllm-cpu", "vllm"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            importlib.metadata.version(name)
            return ""
    return "vLLM is not installed: deploy/quickstart vllm makes an environment that has it"


def make_models() -> None:
    """Makes the models of tests, but those that are there already."""
    program = str(ROOT / "tests" / "vllm" / "tiny.py")
    subprocess.run([sys.executable, program, str(MODELS)], check=True, timeout=START_S)


class EngineError(AssertionError):
    """An engine did not do what it should; the text ends with what it has logged."""


@dataclass
class Answer:
    """How a request ended.

    Attributes:
        tokens: That were generated.
        kv: ``kv_transfer_params`` of the output.
        reason: Why it ended: "length", "abort", "error", ….
        cached: Tokens of the prompt that were not computed here.
        first_at: Monotonic time of the first token; None: there was none.
        last_at: Of the last one.
    """

    tokens: list[int]
    kv: dict[str, Any] | None = None
    reason: str | None = None
    cached: int | None = None
    first_at: float | None = None
    last_at: float | None = None


@dataclass
class Engine:
    """One engine: ``with Engine(folder, "name", connector={…}) as engine``.

    Its processes are a group of their own, which is killed as a whole in the end: what the engine
    computes with outlives its parent otherwise.

    Attributes:
        folder: For its log.
        name: Of the log, and in failures.
        connector: Keys of KVTransferConfig; None: there is none.
        arguments: Of AsyncEngineArgs, instead of what all have.
        environment: Variables besides those that all have.
    """

    folder: Path
    name: str
    connector: dict[str, Any] | None = None
    arguments: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)
    _process: subprocess.Popen[bytes] | None = field(default=None, init=False)
    _channel: socket.socket | None = field(default=None, init=False)
    _buffer: bytes = field(default=b"", init=False)
    _numbers: itertools.count[int] = field(default_factory=itertools.count, init=False)
    _answers: dict[str, dict[str, Any]] = field(default_factory=dict, init=False)

    @property
    def log_path(self) -> Path:
        """Where everything is that its processes print."""
        return self.folder / f"{self.name}.log"

    def log(self) -> str:
        """Returns it."""
        return self.log_path.read_text(errors="replace") if self.log_path.exists() else ""

    def spawn(self) -> Engine:
        """Starts it and does not wait."""
        arguments = {**ARGUMENTS, **self.arguments}
        if self.connector is not None:
            arguments["kv_transfer_config"] = self.connector
        ours, theirs = socket.socketpair()
        with theirs, self.log_path.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, str(PROGRAM), str(theirs.fileno()), json.dumps(arguments)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
                cwd=self.folder,
                env={**os.environ, **ENVIRONMENT, **self.environment, "PYTHONSAFEPATH": "1"},
            )
        self._channel = ours
        return self

    def ready(self, timeout_s: float = START_S) -> Engine:
        """Waits until it takes requests."""
        if "up" not in self._line(time.monotonic() + timeout_s, "start"):
            self._fail("its first line was not that it is up")
        return self

    def __enter__(self) -> Engine:
        try:
            return self.spawn().ready()
        except BaseException:
            self.kill()
            raise

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.kill()

    def kill(self) -> None:
        """Kills all its processes at once, and waits until they are gone. Idempotent."""
        process, self._process = self._process, None
        if self._channel is not None:
            self._channel.close()
            self._channel = None
        if process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(GONE_S)
        deadline = time.monotonic() + GONE_S
        while _group_lives(process.pid):
            if time.monotonic() > deadline:
                raise EngineError(f"engine {self.name}: its processes are not gone in {GONE_S} s")
            time.sleep(0.01)  # the kernel takes them away; nothing tells us when

    def _fail(self, what: str) -> Any:
        raise EngineError(f"engine {self.name}: {what}\n--- its log\n{_shown(self.log())}")

    def _line(self, deadline: float, what: str) -> dict[str, Any]:
        """Reads one line, until the deadline."""
        channel = self._channel
        if channel is None:
            self._fail(f"is not running, asked to {what}")
        assert channel is not None
        while b"\n" not in self._buffer:
            left = deadline - time.monotonic()
            if left <= 0:
                self._fail(f"did not {what} in time")
            channel.settimeout(left)
            try:
                data = channel.recv(1 << 16)
            except TimeoutError:
                continue
            except ConnectionResetError:
                data = b""
            if not data:
                status = None if self._process is None else self._process.poll()
                self._fail(f"ended (status {status}) instead of: {what}")
            self._buffer += data
        line, self._buffer = self._buffer.split(b"\n", 1)
        found: dict[str, Any] = json.loads(line)
        return found

    def _send(self, **command: Any) -> None:
        if self._channel is None:
            self._fail("is not running")
        assert self._channel is not None
        self._channel.settimeout(ANSWER_S)
        self._channel.sendall(json.dumps(command).encode() + b"\n")

    def begin(self, prompt: list[int], tokens: int, kv: dict[str, Any] | None = None) -> str:
        """Starts a request; returns its number, for :meth:`end` and :meth:`abort`."""
        number = f"{self.name}-{next(self._numbers)}"
        self._send(generate=number, prompt=prompt, tokens=tokens, kv=kv)
        return number

    def abort(self, number: str) -> None:
        """Aborts a request."""
        self._send(abort=number)

    def _answer(self, number: str, timeout_s: float) -> dict[str, Any]:
        deadline = time.monotonic() + timeout_s
        while number not in self._answers:
            line = self._line(deadline, f"answer request {number}")
            self._answers[line["id"]] = line
        return self._answers.pop(number)

    def end(self, number: str, timeout_s: float = ANSWER_S) -> Answer:
        """Waits until a request has ended; raises EngineError if it failed."""
        found = self._answer(number, timeout_s)
        if "error" in found:
            self._fail(f"request {number} failed: {found['error']}")
        first, last = (found["times"] or [None])[:1], (found["times"] or [None])[-1:]
        return Answer(
            found["tokens"],
            found.get("kv"),
            found.get("reason"),
            found.get("cached"),
            first[0],
            last[0],
        )

    def generate(self, prompt: list[int], tokens: int, kv: dict[str, Any] | None = None) -> Answer:
        """Runs a request, greedily."""
        return self.end(self.begin(prompt, tokens, kv))

    def metrics(self) -> dict[str, float]:
        """Returns its Prometheus metrics: sums over all labels, by name."""
        number = f"metrics-{next(self._numbers)}"
        self._send(metrics=number)
        found: dict[str, float] = self._answer(number, ANSWER_S)["metrics"]
        return found


def all_given_back(*engines: Engine) -> None:
    """Waits until engines keep blocks for nobody."""
    for engine in engines:
        eventually(
            lambda engine=engine: engine.metrics().get("vllm:kv_cache_usage_perc") == 0.0,  # type: ignore[misc]
            f"{engine.name} has all of its blocks back",
        )


class MakeEngines(Protocol):
    """Starts engines, all at once; they are killed when the test ends."""

    def __call__(self, **named: dict[str, Any]) -> list[Engine]:
        """Starts one for each name, with these arguments of Engine."""
        ...


class Pair(NamedTuple):
    """A prefiller and a decoder with prefix caches, and an engine's answers to compare with."""

    prefill: Engine
    decode: Engine
    address: str

    def alone(self, asked: list[int], tokens: int) -> list[int]:
        """Computes an answer in one engine, without any connector's help."""
        return self.prefill.generate(asked, tokens).tokens


def _shown(log: str) -> str:
    """Cuts a log to its end, and the first failure in it: what follows of that is noise."""
    first = log.find("Traceback")
    if first < 0 or len(log) - first <= LOG_SHOWN:
        return log[-LOG_SHOWN:]
    return f"{log[first : first + LOG_SHOWN]}\n…\n{log[-LOG_SHOWN // 4 :]}"


def _group_lives(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def prompt(tokens: int, seed: int = 0) -> list[int]:
    """Makes a prompt of the tiny model: another one for each seed, from its first token on."""
    return [(i * 37 + i * i * 11 + seed * 101 + 11) % 500 for i in range(tokens)]


def remote_prefill(address: str, transfer_id: str) -> dict[str, Any]:
    """Makes what a decoder is told of a prefill that may not have begun: whose, and its id."""
    return {
        "do_remote_prefill": True,
        "transfer_id": transfer_id,
        "remote_address": address,
    }


def transferd_engine(
    daemon: DaemonProcess, role: str = "kv_both", **options: Any
) -> dict[str, Any]:
    """Makes the arguments of an Engine whose connector is ours, with a daemon's socket."""
    return {
        "connector": {
            "kv_connector": "TransferdConnector",
            "kv_connector_module_path": "transferd.kv.vllm",
            "kv_role": role,
            "kv_load_failure_policy": "recompute",
            "kv_connector_extra_config": {"socket": daemon.socket, **options},
        }
    }
