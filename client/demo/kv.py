# SPDX-License-Identifier: Apache-2.0
"""``transferd demo kv``: prefill and decode in different processes, and the proof."""

from __future__ import annotations

import base64
import random
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from transferd.client import errors
from transferd.client.demo.kvengine import CHUNK, CONFIG, pages_for
from transferd.client.demo.kvfleet import Fleet
from transferd.client.demo.kvrecord import Attempt, Mark, Outcome, Request
from transferd.client.demo.weights import step
from transferd.kv.router import Router, prefix_hashes

if TYPE_CHECKING:
    from rich.console import Console

    from transferd.client.demo.kvfleet import EngineProcess

SEED = 8
IN_FLIGHT = 6
TOKENS = 16  # to generate
LENGTHS = (40, 170, 300, 90, 230, 20, 130, 64)
PREFIX = 4 * CHUNK  # tokens that a third of the prompts begin with
ATTEMPTS = 5
RUN_S, REQUEST_S = 90.0, 1.0  # bound of a part of the demo: for itself, for each request
ROUTE_S = 10.0
AGAIN_S = 0.1
# When a prefiller is killed: a prompt lacks so many chunks, as told no longer ago than this.
LEFT_CHUNKS, FRESH_S = 4, 0.05


def make_prompts(count: int, seed: int = SEED) -> list[list[int]]:
    """Makes prompts of mixed length; every third one begins like the others of these."""
    numbers = random.Random(seed)

    def some(length: int) -> list[int]:
        return [numbers.randrange(CONFIG.vocabulary) for _ in range(length)]

    prefix = some(PREFIX)
    prompts = []
    for number in range(count):
        length = LENGTHS[number % len(LENGTHS)] + numbers.randrange(CHUNK)
        prompts.append(prefix + some(length // 2) if number % 3 == 0 else some(length))
    return prompts


@dataclass(slots=True)
class Driver:
    """Sends the requests, kills one prefiller, starts another.

    Attributes:
        fleet: The processes.
        console: Shows what happens.
        requests: All of them.
        engines: By name; those that live.
        marks: What happened to engines, and when.
    """

    fleet: Fleet
    console: Console
    requests: list[Request]
    engines: dict[str, EngineProcess]
    marks: list[Mark] = field(default_factory=list)
    _router: Router = field(init=False)
    _next: int = 0
    _killed: str = ""
    _new: str = ""
    _joined: bool = False
    _again: list[tuple[float, Request]] = field(default_factory=list)

    def run(self) -> None:
        """Runs until each request has its tokens.

        Raises:
            WaitTimeout: They did not within the bound.
            Unavailable: An engine failed, or a request did too often.
        """
        bound_s = _bound_s(self.requests)
        end = time.monotonic() + bound_s
        with Router(self.fleet.router, ROUTE_S) as self._router:
            while not all(request.tokens for request in self.requests) or not self._joined:
                if time.monotonic() > end:
                    open_ = [str(one.number) for one in self.requests if not one.tokens]
                    raise errors.WaitTimeout(
                        f"after {bound_s:g} s these requests have no tokens: {', '.join(open_)}"
                        if open_
                        else f"{self._new} did not register within {bound_s:g} s"
                    )
                self._submit()
                if not self._killed and self._next and not self._open():
                    self._kill(self.engines["p0"])  # all were too short to be hit in the middle
                told = self.fleet.event(AGAIN_S)
                if told is not None:
                    self._handle(*told)

    # ---- requests ----

    def _submit(self) -> None:
        now = time.monotonic()
        due = [request for at, request in self._again if at <= now]
        self._again = [one for one in self._again if one[0] > now]
        for request in due:
            self._send(request)
        # The last third comes when the new prefiller is there, which has its share of them then.
        limit = len(self.requests) if self._joined else len(self.requests) * 2 // 3
        while self._next < limit and self._open() < IN_FLIGHT:
            request = self.requests[self._next]
            self._next += 1
            self._send(request)

    def _open(self) -> int:
        return sum(not request.tokens for request in self.requests[: self._next])

    def _send(self, request: Request) -> None:
        """Asks the router who serves a request, and tells them."""
        if len(request.attempts) >= ATTEMPTS:
            last = request.attempts[-1]
            raise errors.Unavailable(
                f"request {request.number} failed {ATTEMPTS} times, at last as {last.failed}"
            )
        prefix = prefix_hashes(request.prompt, CONFIG.page_tokens)
        try:
            choice = self._router.route(len(request.prompt), prefix, request.excluded)
        except errors.Unavailable as error:
            if error.reason not in ("NO_PREFILLER", "NO_DECODER"):
                raise
            request.excluded.clear()  # one may come, or come back
            self._again.append((time.monotonic() + AGAIN_S, request))
            return
        attempt = Attempt(
            f"{request.number}.{len(request.attempts)}",
            choice.prefiller.name,
            choice.decoder.name,
            time.monotonic(),
            pages_for(len(request.prompt)) * CONFIG.layers,
        )
        request.attempts.append(attempt)
        self.engines[attempt.decoder].tell(
            do="decode",
            id=attempt.name,
            length=len(request.prompt),
            count=request.count,
            address=base64.b64encode(choice.prefiller.address).decode(),
        )
        self.engines[attempt.prefiller].tell(do="prefill", id=attempt.name, prompt=request.prompt)

    # ---- what engines tell ----

    def _handle(self, engine: EngineProcess, event: dict[str, Any]) -> None:
        kind = event["event"]
        if kind == "ready":
            self._joined = True
            self._mark(f"{engine.name} has registered", engine.name)
            return
        if kind == "gone":
            return  # killed: its decoders will tell
        number, _, index = event["id"].partition(".")
        request = self.requests[int(number)]
        attempt = request.attempts[int(index)]
        match kind:
            case "begun":
                attempt.reused = event["reused"]
            case "chunk":
                attempt.chunks.append((event["first"], event["last"], event["times"]))
                if self._ripe(request, event["last"], event["times"][-1]):
                    self._kill(engine)
            case "landed":
                attempt.samples, attempt.landed = event["samples"], event["at"]
            case "failed":
                self._failed(request, attempt, event)
            case "tokens":
                request.tokens, attempt.ended = event["tokens"], event["at"]

    def _failed(self, request: Request, attempt: Attempt, event: dict[str, Any]) -> None:
        attempt.failed, attempt.detail = event["why"], event["detail"]
        attempt.samples, attempt.ended = event["samples"], event["at"]
        request.excluded.add(attempt.prefiller)
        self.console.print(
            f"  request {request.number}: {attempt.failed} by {attempt.prefiller}, again elsewhere"
        )
        self._send(request)

    def _ripe(self, request: Request, computed: int, at: float) -> bool:
        """Whether this is the moment for a kill: in the middle, of all and of this prompt."""
        if self._killed or time.monotonic() - at > FRESH_S:
            return False
        done = sum(bool(one.tokens) for one in self.requests)
        left = len(request.prompt) - computed
        return 4 * done >= len(self.requests) and left >= LEFT_CHUNKS * CHUNK

    def _kill(self, engine: EngineProcess) -> None:
        engine.kill()
        self._killed = engine.name
        self._new = f"p{sum(name.startswith('p') for name in self.engines)}"
        self._mark(f"{engine.name} is killed (SIGKILL)", engine.name)
        self.engines[self._new] = self.fleet.start("kvprefiller", self._new, 0)
        self._mark(f"{self._new} is started", self._new)

    def _mark(self, text: str, engine: str) -> None:
        self.marks.append(Mark(time.monotonic(), text, engine))
        self.console.print(f"  {text}")


def _bound_s(requests: list[Request]) -> float:
    return RUN_S + REQUEST_S * len(requests)


def _compute_alone(fleet: Fleet, single: EngineProcess, requests: list[Request]) -> None:
    """Has the single engine generate the same."""
    for request in requests:
        single.tell(id=request.number, prompt=request.prompt, count=request.count)
    end = time.monotonic() + _bound_s(requests)
    while not all(request.single for request in requests):
        told = fleet.event(end - time.monotonic())
        if told is None:
            raise errors.WaitTimeout(
                f"the single engine has not answered within {_bound_s(requests):g} s"
            )
        if told[1]["event"] == "single":
            requests[told[1]["id"]].single = told[1]["tokens"]


def run(console: Console, count: int) -> Outcome:
    """Runs the demo.

    Args:
        console: Shows the progress.
        count: Requests.

    Raises:
        TransferdError: It could not be run to its end.
    """
    requests = [Request(n, prompt, TOKENS) for n, prompt in enumerate(make_prompts(count))]
    with Fleet() as fleet:
        with step(console, "two daemons and a router start"):
            fleet.start_daemons()
        with step(console, "two prefillers, two decoders and a single engine start"):
            engines = {
                name: fleet.start(f"kv{kind}", name, host)
                for kind, name, host in (
                    ("prefiller", "p0", 0),
                    ("prefiller", "p1", 0),
                    ("decoder", "d0", 1),
                    ("decoder", "d1", 1),
                )
            }
            single = fleet.start("kvsingle", "single")
            fleet.wait_ready([*engines.values(), single])
        driver = Driver(fleet, console, requests, engines)
        with step(console, f"{count} requests stream, of {TOKENS} tokens each"):
            began = time.monotonic()
            driver.run()
            seconds = time.monotonic() - began
        with step(console, "the single engine computes the same"):
            _compute_alone(fleet, single, requests)
    return Outcome(requests, driver.marks, seconds)
