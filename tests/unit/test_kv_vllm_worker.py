# SPDX-License-Identifier: Apache-2.0
"""A worker's half of the connector for vLLM, against ranks of transferd.kv that are none."""

from __future__ import annotations

from collections import deque
from copy import deepcopy
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from transferd.client.errors import Conflict, QuotaExceeded, Unavailable
from transferd.kv.vllm import stats
from transferd.kv.vllm.layouts import Rank, layout_of
from transferd.kv.vllm.work import Progress, Receive, Work
from transferd.kv.vllm.worker import WorkerSide

from support import vllm_shapes as shapes

if TYPE_CHECKING:
    from collections.abc import Callable

LAYERS = shapes.names(3)
PROMPT = 100


@dataclass(eq=False)
class Transfer:
    """One handle of a decoder."""

    asked: dict[str, Any]
    outcome: Any = None
    detail: str = ""
    cancelled: bool = False

    def cancel(self) -> None:
        self.cancelled = True


@dataclass
class Step:
    """A step of a prefiller, and what it was told."""

    tokens: dict[bytes, int]
    told: list[Any]
    check: Callable[[], None]

    def __enter__(self) -> Step:
        self.told.append(("begin", self.tokens))
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self.told.append("end" if kind is None else "failed")

    def layer_done(self) -> None:
        self.check()
        self.told.append("layer")


@dataclass
class Ranks:
    """A prefiller and a decoder."""

    told: list[Any] = field(default_factory=list)
    over: deque[tuple[bytes, str]] = field(default_factory=deque)
    transfers: list[Transfer] = field(default_factory=list)
    landed: list[Transfer] = field(default_factory=list)
    error: Exception | None = None

    def _fail(self) -> None:
        if self.error is not None:
            raise self.error

    def begin(self, number: bytes, pages: Any, tokens: int) -> None:
        self._fail()
        assert tokens == PROMPT
        self.told.append(("prefill", number, deepcopy(pages)))

    def extend(self, number: bytes, pages: Any) -> None:
        self.told.append(("extend", number, deepcopy(pages)))

    def step(self, tokens: dict[bytes, int], device: bool) -> Step:
        self._fail()
        assert not device
        return Step(tokens, self.told, self._fail)

    def finish(self, number: bytes) -> None:
        self.told.append(("finish", number))

    def abort(self, number: bytes) -> None:
        self.told.append(("abort", number))
        self.over.append((number, "aborted"))

    def released(self, timeout_s: float) -> list[tuple[bytes, str]]:
        assert timeout_s > 0
        return self.poll_prefills()

    def poll_prefills(self) -> list[tuple[bytes, str]]:
        found = list(self.over)
        self.over.clear()
        return found

    def request(self, number: bytes, address: bytes, **values: Any) -> Transfer:
        self._fail()
        self.transfers.append(Transfer({"number": number, "address": address, **values}))
        return self.transfers[-1]

    def decline(self, number: bytes, address: bytes) -> None:
        self._fail()
        self.told.append(("decline", number, address))

    def poll_transfers(self) -> list[Transfer]:
        found, self.landed = self.landed, []
        return found

    def land(self, transfer: Transfer, outcome: str = "complete") -> None:
        transfer.outcome = SimpleNamespace(value=outcome)
        self.landed.append(transfer)

    def worker(self) -> WorkerSide:
        caches = shapes.cpu_caches(LAYERS)
        group = shapes.CacheGroup(LAYERS, shapes.FullAttentionSpec())
        rank = Rank(model="tiny", packing="vec", layers_total=3, heads_total=2)
        found = layout_of(caches, shapes.CacheConfig(16, [group]), rank)
        prefiller = SimpleNamespace(
            begin=self.begin,
            extend=self.extend,
            step=self.step,
            finish=self.finish,
            abort=self.abort,
            released=self.released,
            poll=self.poll_prefills,
        )
        decoder = SimpleNamespace(
            request=self.request, decline=self.decline, poll=self.poll_transfers
        )
        return WorkerSide(found, prefiller, decoder, stats.Stats(100))


@pytest.fixture
def ranks() -> Ranks:
    return Ranks()


@pytest.fixture
def worker(ranks: Ranks) -> WorkerSide:
    return ranks.worker()


def receive(first: int = 32) -> Receive:
    return Receive(b"t", b"address", ([4, 5, 6, 7],), 100, first, 7.0)


def computing(blocks: list[int], tokens: int) -> Work:
    return Work(compute={"r": Progress(b"t", (blocks,), tokens, PROMPT)})


# ---- prefiller ----


def test_chunks_of_a_prompt(ranks: Ranks, worker: WorkerSide) -> None:
    worker.begin(computing([1, 2], 64))
    for name in LAYERS:
        worker.layer_done(name)
    worker.end()
    worker.begin(computing([3], 96))
    worker.end()
    worker.begin(Work())
    worker.layer_done(LAYERS[0])
    worker.end()
    assert ranks.told == [
        ("prefill", b"t", {"0": [1, 2]}),
        ("begin", {b"t": 64}),
        *["layer"] * 3,
        "end",
        ("extend", b"t", {"0": [1, 2, 3]}),
        ("begin", {b"t": 96}),
        *["layer"] * 3,  # no hook told of them
        "end",
    ]


def test_layers_out_of_turn_and_of_others(ranks: Ranks, worker: WorkerSide) -> None:
    worker.begin(computing([1], 32))
    worker.layer_done("model.vision.0")
    worker.layer_done(LAYERS[1])  # the first shares its cache, say, and told of nothing
    worker.layer_done(LAYERS[1])
    assert ranks.told[2:] == ["layer"] * 2


def test_blocks_are_given_back_once_read(ranks: Ranks, worker: WorkerSide) -> None:
    worker.begin(computing([1], 32))
    worker.end()
    worker.begin(Work(finished=["r"]))
    assert ranks.told[-1] == ("finish", b"t")
    assert not worker.results().sent
    ranks.over.append((b"t", "read"))
    assert worker.results().sent == {"r"}
    assert not worker.results().sent
    assert worker.stats.take() == {**stats.empty(), "sent": {"read": 1}}


def test_an_abort(ranks: Ranks, worker: WorkerSide) -> None:
    worker.begin(computing([1], 32))
    worker.end()
    worker.begin(Work(aborted=["r"]))
    assert worker.results().sent == {"r"}


def test_preempted_requests_are_not_told_of(ranks: Ranks, worker: WorkerSide) -> None:
    """Their blocks are taken already; nobody must be told to free them. They may come again."""
    worker.begin(computing([1], 32))
    worker.end()
    worker.preempt(Work(preempted=["r"]))
    worker.preempt(Work(preempted=["r"]))
    assert ranks.told[-1] == ("abort", b"t")
    assert not worker.results().sent
    worker.begin(computing([5], 32))
    assert ("prefill", b"t", {"0": [5]}) in ranks.told


def test_a_preempted_request_that_is_read_for_ever(
    ranks: Ranks, worker: WorkerSide, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transferd.kv.vllm.worker.PREEMPT_S", 0.01)
    worker.begin(computing([1], 32))
    ranks.abort = lambda number: None  # type: ignore[method-assign]
    worker.prefiller.abort = ranks.abort
    with pytest.raises(RuntimeError, match="has not ended"):
        worker.preempt(Work(preempted=["r"]))


def test_a_prefill_that_cannot_begin(ranks: Ranks, worker: WorkerSide) -> None:
    """The engine goes on; its decoder will not get it; its blocks are free at once."""
    ranks.error = QuotaExceeded("too many")
    worker.begin(computing([1], 32))
    worker.layer_done(LAYERS[0])
    worker.end()
    ranks.error = None
    worker.begin(computing([2], 64))
    worker.end()
    worker.begin(Work(finished=["r"]))
    assert worker.results().sent == {"r"}
    assert not ranks.told


def test_two_requests_with_one_transfer_id(ranks: Ranks, worker: WorkerSide) -> None:
    """The second one is for no decoder; the first does not notice."""
    worker.begin(computing([1], PROMPT))
    worker.end()
    worker.begin(Work(finished=["r"]))
    ranks.error = Conflict("it is there already")
    worker.begin(Work(compute={"s": Progress(b"t", ([2],), PROMPT, PROMPT)}))
    ranks.error = None
    worker.end()
    worker.begin(Work(finished=["s"]))
    assert worker.results().sent == {"s"}
    assert ("abort", b"t") not in ranks.told
    ranks.over.append((b"t", "read"))
    assert worker.results().sent == {"r"}


def test_what_is_lost_is_read_until_it_is_released(ranks: Ranks, worker: WorkerSide) -> None:
    """A layer that cannot be told of ends its step: blocks are held until no push is under way."""
    worker.begin(computing([1], 64))
    worker.layer_done(LAYERS[0])
    ranks.error = Unavailable("for a moment")
    worker.layer_done(LAYERS[1])
    ranks.error = None
    assert ranks.told[-2:] == ["failed", ("abort", b"t")]
    aborted, ranks.over = list(ranks.over), deque()
    worker.end()  # of no step
    worker.begin(computing([2], PROMPT))  # for nobody
    worker.end()
    worker.begin(Work(finished=["r"]))
    assert not worker.results().sent
    ranks.over.extend(aborted)
    assert worker.results().sent == {"r"}
    assert "end" not in ranks.told


# ---- decoder ----


def test_what_comes(ranks: Ranks, worker: WorkerSide) -> None:
    worker.ask(Work(receive={"r": receive()}))
    (transfer,) = ranks.transfers
    assert transfer.asked == {
        "number": b"t",
        "address": b"address",
        "pages": {"0": [4, 5, 6, 7]},
        "tokens": 100,
        "first_token": 32,
        "deadline_s": 7.0,
    }
    assert not worker.results().received
    ranks.land(transfer)
    found = worker.results()
    assert (found.received, found.failed, found.blocks) == ({"r"}, set(), set())
    data = worker.stats.take()
    assert data is not None
    assert (data["received"], data["tokens"], data["bytes"]) == ({"complete": 1}, 68, 6800)
    assert len(data["seconds"]) == 1
    assert worker.stats.take() is None


@pytest.mark.parametrize("outcome", ["lost", "deadline", "failed", "faulted", "overrun"])
def test_what_does_not_come_is_computed(ranks: Ranks, worker: WorkerSide, outcome: str) -> None:
    """All of it but the prefix that was here."""
    worker.ask(Work(receive={"r": receive()}))
    ranks.land(ranks.transfers[0], outcome)
    found = worker.results()
    assert (found.received, found.failed, found.blocks) == ({"r"}, {"r"}, {5, 6, 7})
    assert not worker.results().received


@pytest.mark.parametrize("error", [QuotaExceeded("full"), Unavailable("gone")])
def test_what_cannot_be_asked_for_is_computed(
    ranks: Ranks, worker: WorkerSide, error: Exception
) -> None:
    ranks.error = error
    worker.ask(Work(receive={"r": receive(0), "s": receive(0)}))
    found = worker.results()
    assert (found.received, found.blocks) == ({"r", "s"}, {4, 5, 6, 7})
    assert not worker.results().received


def test_a_cancel_ends_when_no_byte_can_land(ranks: Ranks, worker: WorkerSide) -> None:
    worker.ask(Work(receive={"r": receive()}))
    worker.ask(Work(cancel=["r", "never heard of"]))
    assert ranks.transfers[0].cancelled
    assert not worker.results().received
    ranks.land(ranks.transfers[0], "cancelled")
    assert worker.results().received == {"r"}


def test_what_is_not_asked_for_is_declined(
    ranks: Ranks, worker: WorkerSide, caplog: pytest.LogCaptureFixture
) -> None:
    worker.ask(Work(declined=[(b"t", b"address"), (b"u", b"other")]))
    assert ranks.told == [("decline", b"t", b"address"), ("decline", b"u", b"other")]
    ranks.error = Unavailable("gone")
    worker.ask(Work(declined=[(b"v", b"address")]))
    assert "a prefiller keeps blocks until its lease is over: gone" in caplog.text


def test_what_could_not_be_asked_for_is_declined(
    ranks: Ranks, worker: WorkerSide, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **values: Any) -> None:
        raise QuotaExceeded("all slots are in use", reason="IMMS")

    monkeypatch.setattr(worker.decoder, "request", full)
    worker.ask(Work(receive={"r": receive()}))
    assert ranks.told == [("decline", b"t", b"address")]
    assert worker.results().failed == {"r"}


# ---- a new session ----


def test_what_the_old_session_had_has_ended(ranks: Ranks, worker: WorkerSide) -> None:
    """Its ends are told; a prompt of which some is computed is not begun again in its middle."""
    worker.begin(computing([1], 32))
    worker.end()
    worker.ask(Work(receive={"d": receive()}))
    ranks.over.append((b"t", "the daemon is gone"))
    ranks.land(ranks.transfers[0], "lost")
    fresh = Ranks()
    other = fresh.worker()
    worker.renew(other.prefiller, other.decoder)
    worker.begin(computing([2], 64))
    worker.end()
    assert not fresh.told
    worker.begin(Work(finished=["r"]))
    found = worker.results()
    assert (found.sent, found.received, found.failed) == ({"r"}, {"d"}, {"d"})
    worker.begin(Work(compute={"s": Progress(b"s", ([5],), PROMPT, PROMPT)}))
    assert fresh.told[0] == ("prefill", b"s", {"0": [5]})
    worker.ask(Work(receive={"e": receive()}))
    assert len(fresh.transfers) == 1
    assert len(ranks.transfers) == 1


# ---- counts ----


def test_counts_of_workers_are_added() -> None:
    one, other = stats.Stats(10), stats.Stats(10)
    one.received("complete", 100, 0.25)
    other.received("complete", 100, 0.75)
    other.received("lost", 100, 3.0)
    other.sent("read")
    data = stats.add(one.take() or {}, other.take() or {})
    assert data["received"] == {"complete": 2, "lost": 1}
    assert data["bytes"] == 2000
    assert stats.summary(data) == {
        "received": 2,
        "not received": 1,
        "sent": 1,
        "received MiB": round(2000 / (1 << 20), 3),
        "median ms": 750.0,
        "p99 ms": 750.0,
    }


def test_reasons_are_few() -> None:
    """They are values of a label: a text of its own for each would be a metric for each."""
    counted = stats.Stats(1)
    for why in ("read", "lease", "the daemon at unix:///x is gone", "session 7 ended"):
        counted.sent(why)
    assert (counted.take() or {})["sent"] == {"read": 1, "lease": 1, "lost": 2}


def test_seconds_are_bounded() -> None:
    counted = stats.Stats(1)
    for _ in range(stats.SECONDS_KEPT + 5):
        counted.received("complete", 1, 0.1)
    data = counted.take()
    assert data is not None
    assert len(data["seconds"]) == stats.SECONDS_KEPT
    assert data["received"]["complete"] == stats.SECONDS_KEPT + 5
    assert len(stats.add(data, data)["seconds"]) == stats.SECONDS_KEPT
