# SPDX-License-Identifier: Apache-2.0
"""The scheduler's half of the connector: which requests come from, or go to, another engine.

It talks to nobody: what it decides goes to the workers with each step. Nothing of vLLM is imported.

``kv_transfer_params`` of a request:

* at a prefiller ``{"do_remote_decode": true, "transfer_id": …}``. Its output has those for the
  decoder;
* at a decoder ``{"do_remote_prefill": true, "transfer_id": …, "remote_address": …}``. It may be
  there before the prefiller has begun, or even knows of the request, if whoever sends both has
  chosen the id.
"""

from __future__ import annotations

import base64
import binascii
import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from transferd.kv.vllm.work import Progress, Receive, Work

if TYPE_CHECKING:
    from collections.abc import Iterable

    from transferd.kv.vllm.work import Blocks

    Params = dict[str, Any]

logger = logging.getLogger(__name__)

# How a request ends whose prompt is computed.
WHOLE = ("FINISHED_STOPPED", "FINISHED_LENGTH_CAPPED")


@dataclass(slots=True)
class Sending:
    """A request that is computed here for a decoder.

    Attributes:
        transfer_id: Names it.
        tokens: Of its prompt.
        told: The workers know it.
        computed: Tokens that they know to be computed.
    """

    transfer_id: str
    tokens: int
    told: bool = False
    computed: int = 0


class SchedulerSide:
    """The requests of one engine.

    Args:
        sends: It may be a prefiller.
        receives: It may be a decoder.
        deadline_s: How long a decoder waits for a request's cache.

    Attributes:
        address: Of this engine, for decoders; empty as long as the workers have not told theirs.
    """

    def __init__(self, *, sends: bool, receives: bool, deadline_s: float) -> None:
        self.sends = sends
        self.receives = receives
        self.deadline_s = deadline_s
        self.address = b""
        self._work = Work()
        self._computed: dict[str, int] = {}  # tokens that were here, when we were asked
        self._receiving: set[str] = set()
        self._sending: dict[str, Sending] = {}
        self._ending: set[str] = set()  # finished here, not yet released by the workers

    def matched(self, request: Any, computed: int) -> tuple[int, bool]:
        """Tells how many tokens come from elsewhere, and that they come by themselves."""
        params = request.kv_transfer_params or {}
        if not params.get("do_remote_prefill"):
            return 0, False
        problem = self._problem(params)
        if problem:
            logger.error("request %s is computed here: %s", request.request_id, problem)
            params["do_remote_prefill"] = False
            return 0, False
        count = request.num_prompt_tokens - computed
        if count <= 0:
            return 0, False
        self._computed[request.request_id] = computed
        return count, True

    def _problem(self, params: Params) -> str:
        if not self.receives:
            return "kv_role of this engine is kv_producer, and do_remote_prefill is set"
        if not isinstance(params.get("transfer_id"), str) or not params["transfer_id"]:
            return f"transfer_id is a text, not {params.get('transfer_id')!r}"
        if not _decoded(params.get("remote_address")):
            return "remote_address is not what a prefiller's output, or its address_file, has"
        return ""

    def allocated(self, request: Any, blocks: Blocks, external: int) -> None:
        """A request has got blocks, for ``external`` tokens from elsewhere among others."""
        params = request.kv_transfer_params or {}
        name = request.request_id
        if params.get("do_remote_decode"):
            self._begin_sending(request, params)
        if external <= 0 or not params.get("do_remote_prefill"):
            return
        # Asked for once: whatever becomes of it, it is computed here the next time.
        params["do_remote_prefill"] = False
        first = self._computed.pop(name, request.num_prompt_tokens - external)
        self._receiving.add(name)
        self._work.receive[name] = Receive(
            params["transfer_id"].encode(),
            _decoded(params["remote_address"]),
            tuple(list(table) for table in blocks),
            first + external,
            first,
            self.deadline_s,
        )

    def _begin_sending(self, request: Any, params: Params) -> None:
        name = request.request_id
        if name in self._sending:
            return
        if not self.sends:
            logger.error(
                "request %s is for no decoder: kv_role of this engine is kv_consumer, and "
                "do_remote_decode is set",
                name,
            )
            return
        number = params.get("transfer_id")
        number = number if isinstance(number, str) and number else name
        self._sending[name] = Sending(number, request.num_prompt_tokens)

    def work(self, output: Any) -> Work:
        """Takes what the workers have to be told with a step: vLLM's SchedulerOutput."""
        for name in output.preempted_req_ids or ():
            self._preempted(name)
        scheduled = output.num_scheduled_tokens
        for new in output.scheduled_new_reqs:
            if new.req_id in self._sending:
                tokens = new.num_computed_tokens + scheduled[new.req_id]
                self._progress(new.req_id, new.block_ids, tokens)
        cached = output.scheduled_cached_reqs
        for name, blocks, computed in zip(
            cached.req_ids, cached.new_block_ids, cached.num_computed_tokens, strict=True
        ):
            if name in self._sending:
                self._progress(name, blocks, computed + scheduled[name])
        work, self._work = self._work, Work()
        return work

    def _progress(self, name: str, blocks: Blocks | None, tokens: int) -> None:
        sending = self._sending[name]
        if sending.computed == sending.tokens:
            return  # what follows the prompt is not sent
        sending.told = True
        sending.computed = min(tokens, sending.tokens)
        self._work.compute[name] = Progress(
            sending.transfer_id.encode(),
            tuple(list(table) for table in blocks or ()),
            sending.computed,
            sending.tokens,
        )

    def _preempted(self, name: str) -> None:
        """Blocks of a request are taken away: who reads them fails, who has not asked yet waits."""
        sending = self._sending.get(name)
        if sending is not None and sending.told:
            sending.told = False
            sending.computed = 0
            self._work.preempted.append(name)

    def finished(self, request: Any) -> tuple[bool, Params | None]:
        """A request has ended: whether its blocks are held, and what its output says."""
        name = request.request_id
        self._computed.pop(name, None)
        if name in self._receiving:
            self._work.cancel.append(name)
        sending = self._sending.pop(name, None)
        if sending is None or not sending.told:
            return False, None
        self._ending.add(name)
        if request.status.name not in WHOLE:
            self._work.aborted.append(name)
            return True, None
        self._work.finished.append(name)
        return True, {
            "do_remote_prefill": True,
            "do_remote_decode": False,
            "transfer_id": sending.transfer_id,
            "remote_address": base64.b64encode(self.address).decode(),
            "remote_num_tokens": sending.tokens,
        }

    def ended(self, sent: Iterable[str], received: Iterable[str]) -> None:
        """The workers are through with these."""
        self._ending.difference_update(sent)
        self._receiving.difference_update(received)

    @property
    def busy(self) -> bool:
        """Whether the workers have to be asked again, though no request is left to compute."""
        return bool(self._ending or self._receiving)


def _decoded(address: object) -> bytes:
    try:
        return base64.b64decode(address, validate=True) if isinstance(address, str) else b""
    except binascii.Error:
        return b""
