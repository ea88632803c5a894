# SPDX-License-Identifier: Apache-2.0
"""The scheduler's half of the connector: which requests come from, or go to, another engine.

It talks to nobody: what it decides goes to the workers with each step. Nothing of vLLM is imported.

``kv_transfer_params`` of a request:

* at a prefiller ``{"do_remote_decode": true, "transfer_id": …}``. Its output has those for the
  decoder;
* at a decoder ``{"do_remote_prefill": true, "transfer_id": …, "remote_address": …}``. It may be
  there before the prefiller has begun, or even knows of the request, if whoever sends both has
  chosen the id.

Both are asked with the same prompt: between engines a transfer goes by a digest of the id and the
prompt, so that others do not find each other.
"""

from __future__ import annotations

import base64
import contextlib
import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from transferd.kv.vllm.params import (
    OWN_ID_CHARACTERS,
    address_of,
    check_tokens,
    params_of,
    transfer_id_of,
    wire_id,
)
from transferd.kv.vllm.work import Progress, Receive, Work

if TYPE_CHECKING:
    from collections.abc import Iterable

    from transferd.kv.vllm.params import Params
    from transferd.kv.vllm.windows import Window
    from transferd.kv.vllm.work import Blocks

logger = logging.getLogger(__name__)

# How a request ends whose prompt is computed.
WHOLE = ("FINISHED_STOPPED", "FINISHED_LENGTH_CAPPED")


@dataclass(slots=True)
class Asking:
    """A request whose cache may come from a prefiller.

    Attributes:
        number: Names it at the prefiller.
        address: Of the prefiller's engine.
        computed: Tokens that were here, when we were asked last.
    """

    number: bytes
    address: bytes
    computed: int = 0


@dataclass(slots=True)
class Sending:
    """A request that is computed here for a decoder.

    Attributes:
        transfer_id: As users see it.
        number: Names it between engines.
        tokens: Of its prompt.
        told: The workers know it.
        computed: Tokens that they know to be computed.
    """

    transfer_id: str
    number: bytes
    tokens: int
    told: bool = False
    computed: int = 0


class SchedulerSide:
    """The requests of one engine.

    Args:
        sends: It may be a prefiller.
        receives: It may be a decoder.
        deadline_s: How long a decoder waits for a request's cache.
        slots: Transfers to a decoder at once.
        windows: Of the groups whose layers do not look at all tokens.

    Attributes:
        address: Of this engine, for decoders; empty as long as the workers have not told theirs.
    """

    def __init__(
        self,
        *,
        sends: bool,
        receives: bool,
        deadline_s: float,
        slots: int,
        windows: tuple[Window, ...] = (),
    ) -> None:
        self.sends = sends
        self.receives = receives
        self.deadline_s = deadline_s
        self.slots = slots
        self.windows = windows
        self.address = b""
        self._work = Work()
        self._asking: dict[str, Asking] = {}  # offered to vLLM, which has not got blocks for them
        self._receiving: set[str] = set()
        self._sending: dict[str, Sending] = {}
        self._ending: dict[str, bytes] = {}  # finished here, not yet released by the workers
        self._used: set[bytes] = set()  # numbers of those that are sent or ending

    def matched(self, request: Any, computed: int) -> tuple[int | None, bool]:
        """Tells how many tokens come from elsewhere, and that they come by themselves.

        None: vLLM has to ask again later.
        """
        params = params_of(request)
        name, tokens = request.request_id, request.num_prompt_tokens
        if not params.get("do_remote_prefill") or tokens <= computed:
            return 0, False
        if any(window.cuts(tokens) for window in self.windows):
            return 0, False
        if name not in self._asking:
            try:
                self._asking[name] = self._ask(request, params)
            except ValueError as problem:
                logger.error("request %s is computed here: %s", name, problem)
                params["do_remote_prefill"] = False
                return 0, False
        if len(self._receiving) >= self.slots:
            return None, False
        self._asking[name].computed = computed
        return tokens - computed, True

    def _ask(self, request: Any, params: Params) -> Asking:
        if not self.receives:
            raise ValueError("kv_role of this engine is kv_producer, and do_remote_prefill is set")
        check_tokens(params, request.num_prompt_tokens)
        return Asking(wire_id(transfer_id_of(params), request), address_of(params))

    def allocated(self, request: Any, blocks: Blocks, external: int) -> None:
        """A request has got blocks, for ``external`` tokens from elsewhere among others."""
        params = params_of(request)
        name = request.request_id
        if params.get("do_remote_decode") and name not in self._sending:
            self._begin_sending(request, params)
        if external <= 0 or name not in self._asking:
            self._decline(request, params)
            return
        # Asked for once: whatever becomes of it, it is computed here the next time.
        params["do_remote_prefill"] = False
        asking = self._asking.pop(name)
        self._receiving.add(name)
        self._work.receive[name] = Receive(
            asking.number,
            asking.address,
            tuple(list(table) for table in blocks),
            asking.computed + external,
            asking.computed,
            self.deadline_s,
        )

    def _decline(self, request: Any, params: Params) -> None:
        """Has the prefiller hear that a request was not asked for, and will not be."""
        if not params.get("do_remote_prefill"):
            return
        params["do_remote_prefill"] = False
        asking = self._asking.pop(request.request_id, None)
        with contextlib.suppress(ValueError):  # nobody can be told
            asking = asking or self._ask(request, params)
            self._work.declined.append((asking.number, asking.address))

    def _begin_sending(self, request: Any, params: Params) -> None:
        try:
            sending = self._send(request, params)
        except ValueError as problem:
            logger.error("request %s is for no decoder: %s", request.request_id, problem)
            params["do_remote_decode"] = False
        else:
            self._sending[request.request_id] = sending
            self._used.add(sending.number)

    def _send(self, request: Any, params: Params) -> Sending:
        if not self.sends:
            raise ValueError("kv_role of this engine is kv_consumer, and do_remote_decode is set")
        if self.windows and request.max_tokens != 1:
            # What follows the prompt has vLLM drop blocks of the window that is to be sent.
            raise ValueError(
                f"max_tokens is {request.max_tokens}: of a model with windows only 1 can be sent"
            )
        given = params.get("transfer_id") is not None
        chosen = transfer_id_of(params) if given else request.request_id[-OWN_ID_CHARACTERS:]
        number = wire_id(chosen, request)
        if number in self._used:
            raise ValueError("its transfer_id is in use by another one; n has to be 1")
        return Sending(chosen, number, request.num_prompt_tokens)

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
            sending.number,
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
        self._decline(request, params_of(request))
        if name in self._receiving:
            self._work.cancel.append(name)
        sending = self._sending.pop(name, None)
        if sending is None:
            return False, None
        if not sending.told:
            self._used.discard(sending.number)
            return False, None
        self._ending[name] = sending.number
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
        for name in sent:
            self._used.discard(self._ending.pop(name, b""))
        self._receiving.difference_update(received)

    @property
    def busy(self) -> bool:
        """Whether the workers have to be asked again, though no request is left to compute."""
        return bool(self._ending or self._receiving or self._work.declined)
