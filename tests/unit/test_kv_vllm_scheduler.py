# SPDX-License-Identifier: Apache-2.0
"""The scheduler's half of the connector for vLLM: requests in, work for the workers out."""

from __future__ import annotations

import base64
from types import SimpleNamespace
from typing import Any

import pytest

from transferd.kv.vllm.params import ADDRESS_CHARACTERS, wire_id
from transferd.kv.vllm.scheduler import SchedulerSide
from transferd.kv.vllm.windows import Window, windows_of
from transferd.kv.vllm.work import Progress, Receive, Work

from support.vllm_shapes import (
    CacheConfig,
    CacheGroup,
    FullAttentionSpec,
    Request,
    SlidingWindowSpec,
    ended,
    step,
)

ADDRESS = b"address of a prefiller"
REMOTE = base64.b64encode(ADDRESS).decode()
NOTHING = Work()


def side(
    *, sends: bool = True, receives: bool = True, slots: int = 4, windows: tuple[Window, ...] = ()
) -> SchedulerSide:
    made = SchedulerSide(
        sends=sends, receives=receives, deadline_s=7.0, slots=slots, windows=windows
    )
    made.address = ADDRESS
    return made


def decoding(name: str = "r", tokens: int = 100, **params: Any) -> Request:
    kv = {"do_remote_prefill": True, "transfer_id": "t", "remote_address": REMOTE, **params}
    return Request(name, tokens, kv)


def prefilling(name: str = "r", tokens: int = 100, **params: Any) -> Request:
    return Request(name, tokens, {"do_remote_decode": True, **params})


CHOSEN = wire_id("t", decoding())
DECLINED = Work(declined=[(CHOSEN, ADDRESS)])
OWN = wire_id("r", decoding())  # vLLM's own id of the request


# ---- decoder ----


def test_a_request_comes_from_elsewhere() -> None:
    scheduler, request = side(), decoding()
    assert scheduler.matched(request, 32) == (68, True)
    assert scheduler.matched(request, 32) == (68, True)  # may be asked again
    assert scheduler.work(step()) == NOTHING
    scheduler.allocated(request, ([4, 5, 6, 7],), 68)
    work = scheduler.work(step())
    assert work == Work(receive={"r": Receive(CHOSEN, ADDRESS, ([4, 5, 6, 7],), 100, 32, 7.0)})
    assert scheduler.work(step()) == NOTHING
    assert scheduler.busy
    scheduler.ended((), ["r"])
    assert not scheduler.busy


def test_it_is_asked_for_once() -> None:
    """What failed, and what was preempted later, is computed here."""
    scheduler, request = side(), decoding()
    scheduler.matched(request, 0)
    scheduler.allocated(request, ([1],), 100)
    scheduler.allocated(request, ([1, 2],), 0)  # vLLM's second call, after the load
    assert scheduler.matched(request, 0) == (0, False)
    assert len(scheduler.work(step()).receive) == 1


def test_fewer_tokens_than_were_offered() -> None:
    """VLLM may take less; the request then ends there."""
    scheduler, request = side(), decoding()
    assert scheduler.matched(request, 32) == (68, True)
    scheduler.allocated(request, ([1, 2, 3],), 64)
    (receive,) = scheduler.work(step()).receive.values()
    assert (receive.first_token, receive.tokens) == (32, 96)


def test_all_of_it_is_here() -> None:
    scheduler, request = side(), decoding()
    assert scheduler.matched(request, 100) == (0, False)
    scheduler.allocated(request, ([1],), 0)
    assert scheduler.busy  # the prefiller is told, also if no other step follows
    assert scheduler.work(step()) == DECLINED
    scheduler.finished(ended(request))
    assert scheduler.matched(request, 0) == (0, False)
    assert not scheduler.busy
    assert scheduler.work(step()) == NOTHING


def test_it_ends_before_it_is_asked_for() -> None:
    scheduler, offered, unseen = side(), decoding(), decoding("s")
    scheduler.matched(offered, 0)
    for request in (offered, unseen):
        assert scheduler.finished(ended(request, "FINISHED_ABORTED")) == (False, None)
    assert scheduler.work(step()) == Work(declined=DECLINED.declined * 2)
    scheduler.finished(ended(decoding(remote_address="not base64!"), "FINISHED_ABORTED"))
    scheduler.finished(ended(prefilling(), "FINISHED_ABORTED"))
    assert scheduler.work(step()) == NOTHING


def test_nothing_is_taken_of_what_was_offered() -> None:
    scheduler, request = side(), decoding()
    assert scheduler.matched(request, 32) == (68, True)
    scheduler.allocated(request, ([1],), 0)
    assert scheduler.work(step()) == DECLINED


def test_aborted_while_it_comes() -> None:
    scheduler, request = side(), decoding()
    scheduler.matched(request, 0)
    scheduler.allocated(request, ([1],), 100)
    scheduler.work(step())
    assert scheduler.finished(ended(request, "FINISHED_ABORTED")) == (False, None)
    assert scheduler.work(step()) == Work(cancel=["r"])
    assert scheduler.busy  # until its pages are free
    scheduler.ended((), ["r"])
    assert not scheduler.busy
    assert scheduler.finished(ended(request, "FINISHED_ABORTED")) == (False, None)
    assert scheduler.work(step()) == NOTHING


@pytest.mark.parametrize(
    ("params", "roles"),
    [
        ({"transfer_id": ""}, {}),
        ({"transfer_id": 5}, {}),
        ({"transfer_id": "x" * 1000}, {}),
        ({"transfer_id": "\u00e9" * 129}, {}),
        ({"remote_address": "not base64!"}, {}),
        ({"remote_address": "\u00e9"}, {}),
        ({"remote_address": "A" * (ADDRESS_CHARACTERS + 4)}, {}),
        ({"remote_address": None}, {}),
        ({"remote_num_tokens": 99}, {}),
        ({"remote_num_tokens": "100"}, {}),
        ({}, {"receives": False}),
    ],
)
def test_what_cannot_be_asked_for_is_computed_here(
    params: dict[str, Any], roles: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    scheduler, request = side(**roles), decoding(**params)
    assert scheduler.matched(request, 0) == (0, False)
    assert f"is computed here: {next(iter(params), 'kv_role')}" in caplog.text
    assert len(caplog.text) < 500
    scheduler.allocated(request, ([1],), 0)
    assert scheduler.work(step()) == NOTHING


def received(scheduler: SchedulerSide, request: Request) -> Receive:
    """Has a request asked for, and tells how."""
    assert scheduler.matched(request, 0) == (request.num_prompt_tokens, True)
    scheduler.allocated(request, ([1],), request.num_prompt_tokens)
    return scheduler.work(step()).receive[request.request_id]


def test_any_text_names_a_transfer() -> None:
    """Half of a surrogate pair has no UTF-8."""
    asked = received(side(), decoding(transfer_id="\ud800", remote_num_tokens=100))
    assert asked.transfer_id == wire_id("\ud800", decoding()) != CHOSEN


def test_an_address_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """However often vLLM asks: a request may wait for blocks, or for its turn."""
    read: list[object] = []
    decode = base64.b64decode

    def counted(text: str, *, validate: bool) -> bytes:
        read.append(text)
        return decode(text, validate=validate)

    monkeypatch.setattr(base64, "b64decode", counted)
    scheduler, request = side(), decoding()
    assert scheduler.matched(request, 0) == (100, True)
    assert received(scheduler, request).address == ADDRESS
    assert read == [REMOTE]


def test_params_that_are_none() -> None:
    """VLLM does not look at them: with ``vllm_xargs`` they may be anything."""
    scheduler, request = side(), Request("r", 100, "do_remote_prefill do_remote_decode")
    assert scheduler.matched(request, 0) == (0, False)
    scheduler.allocated(request, ([1],), 0)
    assert scheduler.work(step(new={"r": ([1], 0, 100)})) == NOTHING


OTHERS: list[dict[str, Any]] = [
    {"prompt_token_ids": [*range(99), 7]},
    {"prompt_token_ids": [*range(101)]},
    {"lora_request": SimpleNamespace(lora_name="l")},
    {"cache_salt": "l"},
    {"mm_features": [SimpleNamespace(identifier="l")]},
    {"kv_transfer_params": {**(decoding().kv_transfer_params or {}), "transfer_id": "tt"}},
]


def test_a_transfer_is_of_one_prompt() -> None:
    """Who knows an id does not get another's cache for a prompt of his own."""
    ids = {CHOSEN}
    for values in OTHERS:
        request = decoding()
        for key, value in values.items():
            setattr(request, key, value)
        request.num_prompt_tokens = len(request.prompt_token_ids or [])
        ids.add(received(side(), request).transfer_id)
    assert len(ids) == 1 + len(OTHERS)
    assert all(0 < len(one) <= 256 for one in ids)


@pytest.mark.parametrize("tokens", [None, [0] * 100])
def test_embeddings_stay_here(tokens: list[int] | None, caplog: pytest.LogCaptureFixture) -> None:
    """They are in no id; so a prompt of them, or with some, is not transferred."""
    scheduler = side()
    for request in (decoding("d"), prefilling("p")):
        request.prompt_token_ids, request.prompt_embeds = tokens, object()
        assert scheduler.matched(request, 0) == (0, False)
        scheduler.allocated(request, ([1],), 0)
    assert scheduler.work(step(new={"d": ([1], 0, 100), "p": ([1], 0, 100)})) == NOTHING
    assert caplog.text.count("embeddings") == 2


def test_no_more_at_once_than_there_are_slots() -> None:
    """VLLM is told to ask again; one that needs no transfer does not wait."""
    scheduler, late = side(slots=2), decoding("late")
    for name in ("a", "b"):
        received(scheduler, decoding(name, transfer_id=name))
    assert scheduler.matched(late, 0) == (None, False)
    assert scheduler.matched(decoding("here"), 100) == (0, False)
    assert scheduler.matched(decoding("bad", transfer_id=5), 0) == (0, False)
    scheduler.ended((), ["a"])
    assert received(scheduler, late).transfer_id == CHOSEN
    assert scheduler.matched(decoding("later"), 0) == (None, False)


@pytest.mark.parametrize("block", [32, 16])
def test_a_last_token_whose_window_is_cut(block: int) -> None:
    """VLLM drops blocks before token n - w + 1; the last token, computed anew, looks at n - w."""
    cut = [
        n
        for n in range(1, 200)
        if side(windows=(Window(64, block),)).matched(decoding(tokens=n), 0) == (0, False)
    ]
    assert cut == list(range(63 + block, 200, block))
    for n in cut:
        dropped = (n - 64 + 1) // block * block  # tokens of blocks that vLLM has given up
        assert n - 64 < dropped


def test_which_groups_have_windows() -> None:
    groups = [
        CacheGroup(["a"], FullAttentionSpec()),
        CacheGroup(["b"], SlidingWindowSpec(sliding_window=64)),
        CacheGroup(["c"], SlidingWindowSpec(sliding_window=64), enable_kv_transfer=False),
    ]
    assert windows_of(CacheConfig(8, groups)) == (Window(64, 32),)


def test_other_requests_are_nobodys_affair() -> None:
    scheduler, request = side(), Request("r", 100)
    assert scheduler.matched(request, 0) == (0, False)
    scheduler.allocated(request, ([1],), 0)
    assert scheduler.work(step(new={"r": ([1], 0, 100)})) == NOTHING
    assert scheduler.finished(ended(request)) == (False, None)


# ---- prefiller ----


def test_a_prompt_in_chunks() -> None:
    scheduler, request = side(), prefilling(transfer_id="t")
    assert scheduler.matched(request, 0) == (0, False)
    scheduler.allocated(request, ([1, 2],), 0)
    first = scheduler.work(step(new={"r": ([1, 2], 0, 64)}))
    assert first == Work(compute={"r": Progress(CHOSEN, ([1, 2],), 64, 100)})
    last = scheduler.work(step(more={"r": ([3, 4], 64, 36)}))
    assert last == Work(compute={"r": Progress(CHOSEN, ([3, 4],), 100, 100)})
    assert not scheduler.busy
    held, params = scheduler.finished(ended(request))
    assert held
    assert params == {
        "do_remote_prefill": True,
        "do_remote_decode": False,
        "transfer_id": "t",
        "remote_address": REMOTE,
        "remote_num_tokens": 100,
    }
    assert scheduler.busy
    assert scheduler.work(step()) == Work(finished=["r"])
    scheduler.ended(["r"], ())
    assert not scheduler.busy


def test_a_prefix_that_was_here() -> None:
    scheduler, request = side(), prefilling()
    scheduler.allocated(request, ([1, 2],), 0)
    work = scheduler.work(step(new={"r": ([1, 2], 32, 32)}))
    assert work.compute == {"r": Progress(OWN, ([1, 2],), 64, 100)}  # named by vLLM's own id


def test_tokens_beyond_the_prompt_are_not_sent() -> None:
    scheduler, request = side(), prefilling()
    scheduler.allocated(request, ([1],), 0)
    work = scheduler.work(step(new={"r": ([1], 0, 101)}))
    assert work.compute["r"].tokens == 100
    assert scheduler.work(step(more={"r": ([2], 100, 1)})) == NOTHING


def test_aborted_before_it_was_computed() -> None:
    scheduler, request = side(), prefilling()
    scheduler.allocated(request, ([1],), 0)
    scheduler.work(step(new={"r": ([1], 0, 32)}))
    assert scheduler.finished(ended(request, "FINISHED_ABORTED")) == (True, None)
    assert scheduler.work(step()) == Work(aborted=["r"])
    assert scheduler.busy
    scheduler.ended(["r"], ())
    assert not scheduler.busy


def test_aborted_before_it_began() -> None:
    scheduler, request = side(), prefilling()
    assert scheduler.finished(ended(request, "FINISHED_ABORTED")) == (False, None)
    assert scheduler.work(step()) == NOTHING


def test_preempted_and_begun_again() -> None:
    """What it had is given away; it begins anew, with other blocks, for who has not asked yet."""
    scheduler, request = side(), prefilling()
    scheduler.allocated(request, ([1, 2],), 0)
    scheduler.work(step(new={"r": ([1, 2], 0, 64)}))
    assert scheduler.work(step(preempted={"r", "other"})) == Work(preempted=["r"])
    assert scheduler.work(step(preempted={"r"})) == NOTHING
    scheduler.allocated(request, ([7, 8, 9, 10],), 0)
    again = scheduler.work(step(more={"r": ([7, 8, 9, 10], 0, 100)}))
    assert again == Work(compute={"r": Progress(OWN, ([7, 8, 9, 10],), 100, 100)})
    assert scheduler.finished(ended(request))[0]


def test_preempted_and_aborted() -> None:
    scheduler, request = side(), prefilling()
    scheduler.allocated(request, ([1],), 0)
    scheduler.work(step(new={"r": ([1], 0, 32)}))
    scheduler.work(step(preempted={"r"}))
    assert scheduler.finished(ended(request, "FINISHED_ABORTED")) == (False, None)
    assert not scheduler.busy


def test_a_decoder_sends_nothing(caplog: pytest.LogCaptureFixture) -> None:
    scheduler, request = side(sends=False), prefilling()
    scheduler.allocated(request, ([1],), 0)
    assert "kv_consumer" in caplog.text
    assert scheduler.work(step(new={"r": ([1], 0, 32)})) == NOTHING
    assert scheduler.finished(ended(request)) == (False, None)


def told(scheduler: SchedulerSide, request: Request) -> dict[str, Progress]:
    """Has a request begin, and tells what the workers hear of it."""
    scheduler.allocated(request, ([1],), 0)
    return scheduler.work(step(new={request.request_id: ([1], 0, 32)})).compute


def test_an_id_that_is_in_use(caplog: pytest.LogCaptureFixture) -> None:
    """The second is computed and not sent, until the workers are through with the first."""
    scheduler, first = side(), prefilling("a", transfer_id="t")
    assert told(scheduler, first)["a"].transfer_id == CHOSEN
    second = prefilling("b", transfer_id="t")
    assert not told(scheduler, second)
    assert "in use" in caplog.text
    assert scheduler.finished(ended(second)) == (False, None)
    assert scheduler.finished(ended(first))[0]
    assert not told(scheduler, prefilling("c", transfer_id="t"))
    scheduler.ended(["a"], ())
    assert told(scheduler, prefilling("d", transfer_id="t"))["d"].transfer_id == CHOSEN


def test_an_id_of_what_has_not_begun_is_free_again() -> None:
    scheduler, first = side(), prefilling("a", transfer_id="t")
    scheduler.allocated(first, ([1],), 0)
    assert scheduler.finished(ended(first, "FINISHED_ABORTED")) == (False, None)
    assert told(scheduler, prefilling("b", transfer_id="t"))


def test_children_of_a_request() -> None:
    """With ``n`` vLLM hands the same params to all of them."""
    scheduler, params = side(), {"do_remote_decode": True, "transfer_id": "t"}
    assert told(scheduler, Request("0_r", 100, params))
    assert not told(scheduler, Request("1_r", 100, params))
    assert scheduler.finished(ended(Request("0_r", 100, params)))[0]


@pytest.mark.parametrize("chosen", [5, "", "x" * 1000])
def test_an_id_that_is_none(chosen: object, caplog: pytest.LogCaptureFixture) -> None:
    assert not told(side(), prefilling(transfer_id=chosen))
    assert "is for no decoder: transfer_id is" in caplog.text
    assert len(caplog.text) < 500


def test_a_long_name_of_vllms_names_a_transfer() -> None:
    """A header may choose the most of it, vLLM makes its end unique; a decoder takes the answer."""
    scheduler = side()
    for end in ("1", "2"):
        request = prefilling("\u00e9" * 1000 + end)
        number = told(scheduler, request)[request.request_id].transfer_id
        _, params = scheduler.finished(ended(request))
        assert params is not None
        assert received(side(), Request("r", 100, params)).transfer_id == number


@pytest.mark.parametrize("windows", [(Window(64, 32),), ()])
def test_blocks_of_a_window_are_gone_after_the_prompt(
    windows: tuple[Window, ...], caplog: pytest.LogCaptureFixture
) -> None:
    scheduler, request = side(windows=windows), prefilling("r")
    request.max_tokens = 2
    assert bool(told(scheduler, request)) == (not windows)
    assert ("max_tokens is 2" in caplog.text) == bool(windows)
    assert told(scheduler, prefilling("other"))
