# SPDX-License-Identifier: Apache-2.0
"""The scheduler's half of the connector for vLLM: requests in, work for the workers out."""

from __future__ import annotations

import base64
from typing import Any

import pytest

from transferd.kv.vllm.scheduler import SchedulerSide
from transferd.kv.vllm.work import Progress, Receive, Work

from support.vllm_shapes import Request, ended, step

ADDRESS = b"address of a prefiller"
REMOTE = base64.b64encode(ADDRESS).decode()
NOTHING = Work()


def side(*, sends: bool = True, receives: bool = True) -> SchedulerSide:
    made = SchedulerSide(sends=sends, receives=receives, deadline_s=7.0)
    made.address = ADDRESS
    return made


def decoding(**params: Any) -> Request:
    return Request(
        "r",
        100,
        {"do_remote_prefill": True, "transfer_id": "t", "remote_address": REMOTE, **params},
    )


def prefilling(tokens: int = 100, **params: Any) -> Request:
    return Request("r", tokens, {"do_remote_decode": True, **params})


# ---- decoder ----


def test_a_request_comes_from_elsewhere() -> None:
    scheduler, request = side(), decoding()
    assert scheduler.matched(request, 32) == (68, True)
    assert scheduler.matched(request, 32) == (68, True)  # may be asked again
    assert scheduler.work(step()) == NOTHING
    scheduler.allocated(request, ([4, 5, 6, 7],), 68)
    work = scheduler.work(step())
    assert work == Work(receive={"r": Receive(b"t", ADDRESS, ([4, 5, 6, 7],), 100, 32, 7.0)})
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
    assert scheduler.work(step()) == NOTHING


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
    assert scheduler.finished(ended(decoding())) == (False, None)
    assert scheduler.work(step()) == NOTHING


@pytest.mark.parametrize(
    ("params", "roles"),
    [
        ({"transfer_id": ""}, {}),
        ({"transfer_id": 5}, {}),
        ({"remote_address": "not base64!"}, {}),
        ({"remote_address": None}, {}),
        ({}, {"receives": False}),
    ],
)
def test_what_cannot_be_asked_for_is_computed_here(
    params: dict[str, Any], roles: dict[str, bool], caplog: pytest.LogCaptureFixture
) -> None:
    scheduler, request = side(**roles), decoding(**params)
    assert scheduler.matched(request, 0) == (0, False)
    assert "is computed here" in caplog.text
    scheduler.allocated(request, ([1],), 0)
    assert scheduler.work(step()) == NOTHING


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
    assert first == Work(compute={"r": Progress(b"t", ([1, 2],), 64, 100)})
    last = scheduler.work(step(more={"r": ([3, 4], 64, 36)}))
    assert last == Work(compute={"r": Progress(b"t", ([3, 4],), 100, 100)})
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
    assert work.compute == {"r": Progress(b"r", ([1, 2],), 64, 100)}  # named by vLLM's own id


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
    assert again == Work(compute={"r": Progress(b"r", ([7, 8, 9, 10],), 100, 100)})
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
