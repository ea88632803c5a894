# SPDX-License-Identifier: Apache-2.0
"""What comes between a count and work on GPU memory that NICs write, by what the device says."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from transferd.client import errors
from transferd.client.cuda import driver as drivers
from transferd.client.cuda import flush, relay
from transferd.client.cuda.allocation import Allocations
from transferd.client.cuda.arrays import device_array
from transferd.client.cuda.driver import CudaError
from transferd.client.cuda.flush import Flusher, Need
from transferd.client.session import CounterView
from transferd.native.client_half import lib
from transferd.v1 import attach_pb2

from support.fakecuda import DeviceBuffer, FakeCuda, installed
from support.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

NONE, OWNER, ALL_DEVICES = 0, 100, 200
HOST, MEMOPS = 1, 2
LENGTH = 10_000


class Session:
    """Answers as a daemon with so many NICs that take dma-bufs."""

    closed = False

    def __init__(self, rails: int) -> None:
        self.rails = rails
        self.shares: list[Any] = []

    def ask(self, message: Any, fds: list[int]) -> tuple[Any, list[int]]:
        self.shares.append(message.share_cuda_memory)
        assert len(fds) == message.share_cuda_memory.dmabuf
        return attach_pb2.FdResponse(share_memory=attach_pb2.ShareMemoryResponse(memory_id=7)), []

    def region_register(self, memory_id: int, length: int, name: str) -> Any:
        return SimpleNamespace(region=5, rails=self.rails if self.shares[-1].dmabuf else 0)


class World:
    """A process with one device of the kind that is asked for, and its session."""

    def __init__(self, cuda: FakeCuda, rails: int) -> None:
        self.cuda = cuda
        self.session = Session(rails)
        self.driver = drivers.load()
        self.daemon = b"life"
        self.context = cuda.context_of
        self.flusher = Flusher(self)  # type: ignore[arg-type]
        self.allocations = Allocations(self)  # type: ignore[arg-type]

    def register(self) -> Any:
        buffer = DeviceBuffer(self.cuda, self.cuda.malloc(LENGTH), LENGTH)
        array = device_array(buffer)
        assert array is not None
        return self.allocations.take(array, "")


@pytest.fixture
def made(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    ordering, options, rails = request.param
    with installed(monkeypatch, flush=(ordering, options), dmabufs=True) as cuda:
        world = World(cuda, rails)
        monkeypatch.setattr(flush, "gate_address", lambda gpu, slot: word_of(cuda))
        yield world
        world.flusher.close()


def word_of(cuda: FakeCuda) -> int:
    """A word of 0 that streams can wait for."""
    if not hasattr(cuda, "word"):
        cuda.word = cuda.malloc(4096)  # type: ignore[attr-defined]
    address: int = cuda.word  # type: ignore[attr-defined]
    return address


ROWS = [
    (NONE, 0, Need.IMPOSSIBLE),
    (NONE, HOST, Need.HOST),
    (NONE, MEMOPS, Need.STREAM),
    (NONE, HOST | MEMOPS, Need.STREAM_OR_HOST),
    *(
        (ordering, options, Need.NOT_NEEDED)
        for ordering in (OWNER, ALL_DEVICES)
        for options in (0, HOST, MEMOPS, HOST | MEMOPS)
    ),
]


@pytest.mark.parametrize(
    ("made", "need"),
    [((ordering, options, 1), need) for ordering, options, need in ROWS],
    indirect=["made"],
    ids=[f"{ordering}-{options}" for ordering, options, _ in ROWS],
)
def test_each_kind_of_device(made: World, need: Need, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "transferd"):
        allocation = made.register()
    (share,) = made.session.shares
    assert len(share.ipc_handle) == 64  # for this host, whatever NICs can do
    if need is Need.IMPOSSIBLE:
        assert not share.dmabuf
        assert "cuMemGetHandleForAddressRange" not in made.cuda.calls
        assert "neither orders" in allocation.without_nics
        assert "neither orders" in caplog.text
        made.register()
        assert caplog.text.count("neither orders") == 1  # of a device once
    else:
        assert share.dmabuf
        assert share.flush == need == made.flusher.need(0)
        assert not allocation.without_nics
        assert not caplog.records
    flushed = need in (Need.STREAM, Need.HOST, Need.STREAM_OR_HOST)
    assert made.flusher.devices == ({0: need} if flushed else {})
    assert made.flusher.relays(0) == (need is Need.HOST)
    made.flusher.host()
    by = {Need.STREAM: "stream", Need.HOST: "host", Need.STREAM_OR_HOST: "host"}
    assert made.cuda.flushes == ([(by[need], 0)] if need in by else [])


@pytest.mark.parametrize("made", [(NONE, HOST, 0)], indirect=True)
def test_where_no_nic_takes_it_nothing_is_flushed(made: World) -> None:
    allocation = made.register()
    assert "no NIC of this host" in allocation.without_nics
    assert not made.flusher.devices
    assert not made.flusher.relays(0)  # what hosts and streams write needs none


@pytest.mark.parametrize("made", [(NONE, HOST, 1)], indirect=True)
def test_a_driver_that_makes_no_dmabuf(made: World) -> None:
    made.cuda.fail("cuMemGetHandleForAddressRange", 801)
    assert "makes no dma-buf" in made.register().without_nics
    assert not made.flusher.devices


@pytest.mark.parametrize("made", [(NONE, HOST, 1)], indirect=True)
def test_a_driver_without_the_call(made: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(made.driver._functions, "cuFlushGPUDirectRDMAWrites")
    assert made.flusher.need(0) is Need.IMPOSSIBLE


@pytest.mark.parametrize("made", [(NONE, HOST, 1), (NONE, MEMOPS, 1)], indirect=True)
def test_reads_into_it_count_too(made: World) -> None:
    allocation = made.register()
    assert not made.flusher.reads
    allocation.read_into()
    assert made.flusher.reads


@pytest.mark.parametrize("made", [(OWNER, HOST, 1)], indirect=True)
def test_reads_where_nothing_is_to_be_flushed(made: World) -> None:
    made.register().read_into()
    assert not made.flusher.reads


@pytest.mark.parametrize("made", [(NONE, MEMOPS, 1)], indirect=True)
def test_a_stream_that_does_not_flush(made: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is told, with a bound: who waits would take stale data for new."""
    made.register()
    made.cuda.held.clear()
    monkeypatch.setattr(flush, "FLUSH_S", 0.01)
    with pytest.raises(errors.Unavailable, match="CUDA_DEVICE_MAX_CONNECTIONS") as caught:
        made.flusher.host()
    assert caught.value.reason == "FLUSH_LATE"
    made.cuda.held.set()
    eventually(lambda: made.cuda.flushes == [("stream", 0)], "it goes on")
    made.flusher.host()
    assert made.cuda.flushes == [("stream", 0)] * 2
    made.cuda.break_context(0)
    with pytest.raises(CudaError, match="wrong address"):
        made.flusher.host()


@pytest.mark.parametrize("made", [(NONE, HOST, 1)], indirect=True)
def test_a_flush_that_fails_is_told(made: World) -> None:
    made.register()
    made.cuda.fail("cuFlushGPUDirectRDMAWrites", 700)
    with pytest.raises(CudaError, match="cuFlushGPUDirectRDMAWrites failed"):
        made.flusher.host()


# ---- words that follow gates ----


class Counters:
    """A session whose counters are what a test says; as a Gpu it notes when it is flushed."""

    client = None

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.views: dict[int, CounterView] = {}
        self.words: dict[int, int] = {}
        self.flushes: list[dict[int, int]] = []  # what the words were
        self.watches: list[Callable[[], bool]] = []
        self.session = self.flusher = self
        self.add = self.watches.append
        monkeypatch.setattr(relay, "take_watcher", self.take)
        monkeypatch.setattr(relay, "watcher_pointer", lambda gpu, word: 4096 + 64 * word)
        monkeypatch.setattr(relay, "lib", SimpleNamespace(tfd_client_watcher_set=self.store))
        self.relays = relay.Relays(self)  # type: ignore[arg-type]

    def take(self, session: Any) -> int:
        word = 7 + len(self.words)
        self.words[word] = 0
        return word

    def store(self, client: Any, word: int, value: int) -> None:
        self.words[word] = value

    def slot_read(self, slot: int) -> CounterView:
        if slot not in self.views:
            raise errors.Unavailable("the session is over")
        return self.views[slot]

    def host(self) -> None:
        self.flushes.append(dict(self.words))

    def count(self, slot: int, value: int, faults: int = 0, acknowledged: int = 0) -> None:
        self.views[slot] = CounterView(value, faults, 0, acknowledged)


@pytest.fixture
def counters(monkeypatch: pytest.MonkeyPatch) -> Counters:
    return Counters(monkeypatch)


def test_words_follow_their_gates_behind_a_flush(counters: Counters) -> None:
    counters.count(1, 3)
    counters.count(2, 0)
    relays = counters.relays
    assert relays.pointer(1, counters) == 4096 + 64 * 7  # type: ignore[arg-type]
    assert counters.words == {7: 3}  # what has been counted already
    assert counters.flushes == [{7: 0}]
    relays.pointer(2, counters)  # type: ignore[arg-type]
    assert relays.pointer(1, counters) == 4096 + 64 * 7  # type: ignore[arg-type]
    (watch,) = counters.watches
    assert len(counters.flushes) == 1
    counters.count(1, 5)
    counters.count(2, 1)
    assert not watch()
    assert counters.words == {7: 5, 8: 1}
    assert counters.flushes[1:] == [{7: 3, 8: 0}]
    assert not watch()
    assert len(counters.flushes) == 2  # nothing has moved


def test_a_fault_and_its_acknowledgement_follow_too(counters: Counters) -> None:
    counters.count(1, 3, faults=1)
    counters.relays.pointer(1, counters)  # type: ignore[arg-type]
    assert counters.words == {7: relay.FAULT + 3}
    counters.count(1, 3, faults=2, acknowledged=2)
    counters.relays.refresh()
    assert counters.words == {7: 3}
    assert lib.TFD_GATE_FAULT == relay.FAULT


@pytest.mark.parametrize("end", ["over", "closed", "context"])
def test_the_end_lets_streams_through(counters: Counters, end: str) -> None:
    counters.count(1, 3)
    counters.relays.pointer(1, counters)  # type: ignore[arg-type]
    (watch,) = counters.watches
    if end == "over":
        counters.views.clear()
    elif end == "context":
        counters.count(1, 4)
        counters.host = lambda: (_ for _ in ()).throw(CudaError("a call", 700, "LOST"))  # type: ignore[method-assign]
    else:
        counters.relays.release()
    assert watch()  # it looks no more
    assert counters.words == {7: relay.FAULT}
    counters.count(1, 9)
    counters.relays.refresh()
    assert counters.words == {7: relay.FAULT}
