# SPDX-License-Identifier: Apache-2.0
"""The router as a process: engines join, leave, die; the router dies, too."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import grpc
import pytest

import transferd
from transferd.client.demo.daemons import free_port
from transferd.kv import fingerprint
from transferd.kv.router import Engine, Load, Registration, Router
from transferd.kv.router.policy import DECODER, PREFILLER
from transferd.kv.v1 import router_pb2, router_pb2_grpc

from support.kv_engines import DecodeEngine, PrefillEngine, alone
from support.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from support.daemon import DaemonProcess

INTERVAL_S, LEASE_S = 0.1, 1.0


class RouterProcess:
    def __init__(self, address: str) -> None:
        self.address = address
        self.start()

    def start(self) -> None:
        self.process = subprocess.Popen(
            [
                *(sys.executable, "-m", "transferd.kv.router", "--listen", self.address),
                *("--interval", str(INTERVAL_S), "--lease", str(LEASE_S)),
            ],
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None
        assert self.address in self.process.stdout.readline()

    def end(self, number: int = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        assert self.process.stdout is not None
        self.process.stdout.close()
        return self.process.wait(10)


@pytest.fixture
def router() -> Iterator[RouterProcess]:
    process = RouterProcess(f"127.0.0.1:{free_port()}")
    yield process
    if process.process.poll() is None:
        assert process.end() == 0


def engine(name: str, role: str = PREFILLER) -> Engine:
    return Engine(name, role, os.urandom(16), b"model", f"at {name}".encode(), 16)


def names(asking: Router) -> list[str]:
    return [each.name for each, _ in asking.engines()]


def test_engines_come_and_go(router: RouterProcess) -> None:
    with Router(router.address) as asking:
        with pytest.raises(transferd.Unavailable) as raised:
            asking.route(10)
        assert raised.value.reason == "NO_DECODER"
        decoder = Registration(router.address, engine("d", DECODER), Load)
        decoder.wait(10)
        with Registration(router.address, engine("p"), lambda: Load(waiting=5)) as prefiller:
            prefiller.wait(10)
            choice = asking.route(10)
            assert (choice.prefiller.name, choice.prefiller.address) == ("p", b"at p")
            assert choice.decoder.name == "d"
            eventually(
                lambda: ("p", 5) in [(e.name, load.waiting) for e, load in asking.engines()],
                "the load is told",
            )
        eventually(lambda: names(asking) == ["d"], "the prefiller has left")
        decoder.close()
        eventually(lambda: names(asking) == [], "both have left")


def test_an_engine_that_dies_is_gone_at_once(router: RouterProcess) -> None:
    program = (
        "import sys, time\n"
        "from transferd.kv.router import Engine, Load, Registration\n"
        "r = Registration(sys.argv[1], Engine('p', 'prefiller', b'1' * 16, b'm', b'', 16), Load)\n"
        "r.wait(10); print('there', flush=True); time.sleep(60)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, router.address], stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "there\n"
        with Router(router.address) as asking:
            assert names(asking) == ["p"]
            child.kill()
            eventually(lambda: names(asking) == [], "it is forgotten")


def test_an_engine_that_stands_still_is_forgotten_and_comes_back(router: RouterProcess) -> None:
    child = subprocess.Popen(
        [
            *(sys.executable, "-c"),
            "import sys, time\n"
            "from transferd.kv.router import Engine, Load, Registration\n"
            "e = Engine('p', 'prefiller', b'1' * 16, b'm', b'', 16)\n"
            "r = Registration(sys.argv[1], e, Load)\n"
            "r.wait(10); print('there', flush=True); time.sleep(60)\n",
            router.address,
        ],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert child.stdout is not None
        assert child.stdout.readline() == "there\n"
        with Router(router.address) as asking:
            child.send_signal(signal.SIGSTOP)
            eventually(lambda: names(asking) == [], "it is forgotten")
            child.send_signal(signal.SIGCONT)
            eventually(lambda: names(asking) == ["p"], "it is back")
    finally:
        child.kill()
        child.wait(10)
        assert child.stdout is not None
        child.stdout.close()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_router_that_restarts_knows_all_again(router: RouterProcess, number: int) -> None:
    with (
        Registration(router.address, engine("p"), Load) as one,
        Registration(router.address, engine("d", DECODER), Load) as other,
        Router(router.address, timeout_s=20.0) as asking,
    ):
        one.wait(10)
        other.wait(10)
        router.end(number)
        router.start()
        eventually(lambda: names(asking) == ["d", "p"], "both are back")
        assert asking.route(1).prefiller.name == "p"


def test_a_second_engine_of_a_name_is_told_why(router: RouterProcess) -> None:
    with Registration(router.address, engine("p"), Load) as one:
        one.wait(10)
        with Registration(router.address, engine("p"), Load) as other:
            eventually(lambda: other.refused is not None, "it is refused")
            with pytest.raises(transferd.WaitTimeout, match="another boot"):
                other.wait(0)
            one.close()
            other.wait(10)


def call(router: RouterProcess, use: Callable[[Any], Any]) -> grpc.RpcError:
    with grpc.insecure_channel(router.address) as channel:
        with pytest.raises(grpc.RpcError) as raised:
            use(router_pb2_grpc.KvRouterServiceStub(channel))
        return raised.value


def described(**changes: Any) -> router_pb2.RegisterRequest:
    fields: dict[str, Any] = {
        "name": "p",
        "role": router_pb2.ENGINE_ROLE_PREFILLER,
        "boot": bytes(16),
        "fingerprint": b"m",
        "page_tokens": 16,
    }
    return router_pb2.RegisterRequest(engine=router_pb2.Engine(**{**fields, **changes}))


@pytest.mark.parametrize(
    ("first", "words"),
    [
        (described(name=""), "name is"),
        (described(name="x" * 200), "name is"),
        (described(role=0), "role is"),
        (described(boot=b"short"), "boot has 16 bytes; got 5"),
        (described(fingerprint=b""), "fingerprint has"),
        (described(address=bytes(100_000)), "address has at most"),
        (described(page_tokens=0), "page_tokens is"),
        (router_pb2.RegisterRequest(load=router_pb2.Load()), "the first message"),
        (router_pb2.RegisterRequest(), "the first message"),
    ],
)
def test_a_strange_engine_is_refused(
    router: RouterProcess, first: router_pb2.RegisterRequest, words: str
) -> None:
    error: Any = call(router, lambda stub: list(stub.Register(iter([first]))))
    assert error.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert words in error.details()


def test_an_engine_describes_itself_once(router: RouterProcess) -> None:
    twice = [described(), described()]
    error: Any = call(router, lambda stub: list(stub.Register(iter(twice))))
    assert error.code() == grpc.StatusCode.INVALID_ARGUMENT


def test_wrong_questions_name_the_field(router: RouterProcess) -> None:
    with Router(router.address) as asking:
        with pytest.raises(transferd.InvalidRequest, match="tokens is at least 1"):
            asking.route(0)
        with pytest.raises(transferd.InvalidRequest, match="exclude has at most 256"):
            asking.route(1, exclude=[str(i) for i in range(300)])


def test_the_address_in_use_is_named(router: RouterProcess) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "transferd.kv.router", "--listen", router.address],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert done.returncode == 1
    assert f"cannot listen on {router.address}" in done.stderr


def test_a_new_prefiller_serves_at_once(
    router: RouterProcess, shared_pair: tuple[DaemonProcess, DaemonProcess]
) -> None:
    prompt = list(range(40))
    with contextlib.ExitStack() as stack:
        one, other = (stack.enter_context(transferd.Client(d.socket)) for d in shared_pair)
        prefiller, decoder = PrefillEngine(one), DecodeEngine(other)
        for each in (prefiller, decoder):
            stack.callback(each.close)
            stack.enter_context(each.rank)
        mark = fingerprint(prefiller.layout).encode()
        me = Engine("d", DECODER, decoder.rank.boot, mark)
        stack.enter_context(Registration(router.address, me, decoder.rank.load)).wait(10)
        me = Engine("p", PREFILLER, prefiller.rank.boot, mark, prefiller.rank.address, 8)
        stack.enter_context(Registration(router.address, me, prefiller.rank.load)).wait(10)
        asking = stack.enter_context(Router(router.address))
        choice = asking.route(len(prompt))
        assert (choice.prefiller.name, choice.decoder.name) == ("p", "d")
        transfer, pages = decoder.ask(b"r", choice.prefiller.address, prompt, 3)
        token = prefiller.prefill(b"r", prompt)
        transfer.wait(timeout_s=20)
        assert decoder.generate(prompt, pages, token, 3) == alone(prompt, 3)
        prefiller.rank.drain()
        eventually(
            lambda: [load.draining for e, load in asking.engines() if e.name == "p"] == [True],
            "the router knows that it leaves",
        )
        with pytest.raises(transferd.Unavailable):
            asking.route(1)
