# SPDX-License-Identifier: Apache-2.0
"""The thread of a rank: what comes in goes to the core, and its actions are carried out.

The core runs under one lock, in whichever thread has an event for it. What nobody calls for
(letters, ends of jobs, counts) is taken in turns, by the Client's thread that has seen that
something ended or was counted; the pump's own thread takes those that are due, and those for which
the lock was not free. Calls of the daemon that take a round trip (grants, fences, opening of
descriptors) are made by a few helpers, so that none of them makes others wait.
"""

from __future__ import annotations

import contextlib
import heapq
import itertools
import logging
import threading
import time
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from transferd.client import JobStatus, errors
from transferd.kv.protocol.actions import Send
from transferd.kv.protocol.bounds import LETTER_BYTES_MAX

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from transferd.client.client import Client
    from transferd.client.job import Job
    from transferd.kv.protocol.actions import Action, SendKey
    from transferd.kv.protocol.bounds import Settings

SLOTS = 64  # letters that wait in a mailbox; senders of more wait
HELPERS = 4
LETTERS_MAX = 256  # that one turn takes, so that others have theirs
CLOSE_S = 10.0
# Ends by which a destination is gone for good, rather than out of reach for now. Not STALE: its
# relation is over, and whether the next one still knows it is told when it is opened anew.
DEAD = frozenset({"REVOKED", "BAD_GRANT", "EXPIRED", "RIGHTS"})

T = TypeVar("T")

log = logging.getLogger("transferd")


def is_dead(job: Job) -> bool:
    """Tells of a job that has failed whether its destination will never be there again."""
    result = job.result
    return result is not None and (result.status is JobStatus.INVALID or result.detail in DEAD)


def why(job: Job) -> str:
    """Tells in a few words how a job has ended."""
    result = job.result
    if result is None:
        return "its end is not known"
    return f"{result.status.name}{f' ({result.detail})' if result.detail else ''}"


class Kind(NamedTuple):
    """What a kind of rank does; all under the pump's lock.

    Attributes:
        turn: Looks at what only it has.
        do: Carries out an action that is no Send, without waiting for anything.
        failed: Its session is over, and all with it.
    """

    turn: Callable[[float], None]
    do: Callable[[Action], None]
    failed: Callable[[errors.TransferdError], None]


class Pump:
    """What both kinds of ranks have: lock, thread, mailbox, helpers.

    Attributes:
        client: The Client.
        lock: Guards the core, and all that belongs to it.
        session: The Client's.
    """

    core: Any

    def __init__(self, client: Client, name: str, settings: Settings, kind: Kind) -> None:
        """Makes the mailbox; :meth:`begin` starts the thread.

        Args:
            client: The Client.
            name: For people.
            settings: Times and limits.
            kind: What a decoder and a prefiller do differently.

        Raises:
            Conflict: NO_SHARED_MEMORY.
            QuotaExceeded: No room for the mailbox.
        """
        self._kind = kind
        self.client = client
        self.session: Any = client._session
        if not client.shared_memory:
            raise errors.Conflict(
                "transferd.kv needs shared memory with the daemon: attach by its Unix socket, "
                "without shared_memory=False",
                reason="NO_SHARED_MEMORY",
            )
        self.lock = threading.RLock()
        self.mailbox = client.mailbox(slots=SLOTS, slot_bytes=LETTER_BYTES_MAX)
        self._name = name
        self._timeout_s = settings.timeout_s
        self._wake = threading.Event()
        self._posted: deque[Callable[[float], list[Action]]] = deque()
        self._later: list[tuple[float, int, Callable[[], object]]] = []
        self._serial = itertools.count()
        self._sent: dict[bytes, deque[tuple[Job, SendKey]]] = {}
        self._opening: dict[bytes, list[Callable[[Exception | None], None]]] = {}
        self._serves = threading.local()  # .now: this thread takes a turn after what it does
        self._sleeps_until: float | None = 0.0  # the own thread; None: until it is woken
        self._helpers = ThreadPoolExecutor(HELPERS, thread_name_prefix=f"kv-{name}")
        self._over = False
        self._failure: errors.TransferdError | None = None
        self._thread = threading.Thread(target=self._run, name=f"kv-{name}", daemon=True)

    def begin(self) -> None:
        """Starts."""
        self._thread.start()
        self.client._driver.add(self._look)

    def _look(self) -> bool:
        """Called whenever something of the session has ended or was counted."""
        self._serve()
        return self._over

    def _serve(self) -> None:
        """Takes a turn in this thread, where the news is: to wake another would take its time."""
        if not self.lock.acquire(blocking=False):
            self._wake.set()
            return
        self._serves.now = True
        try:
            if self.over:
                return
            self._turn()
            if self._posted:
                self._turn()
            due = self._due()
            late = self._sleeps_until is None or (due is not None and due < self._sleeps_until)
            if self._posted or (due is not None and late):
                self._wake.set()
        except Exception as error:
            self._fail(error)
        finally:
            self._serves.now = False
            self.lock.release()

    # ---- events ----

    def feed(self, actions: Iterable[Action]) -> None:
        """Carries out what an event has led to; under the lock."""
        for action in actions:
            if isinstance(action, Send):
                self._send(action)
            else:
                self._kind.do(action)

    def enter(self, call: Callable[[float], list[Action]]) -> None:
        """Gives the core an event, in the caller's thread.

        Raises:
            Unavailable: The session is over, or this rank is closed.
        """
        with self.lock:
            self.check()
            self.feed(call(time.monotonic()))
        self._wake.set()  # times may have changed

    def post(self, call: Callable[[float], list[Action]]) -> None:
        """Has the pump give the core an event."""
        self._posted.append(call)
        if not getattr(self._serves, "now", False):
            self._wake.set()

    @property
    def posted(self) -> bool:
        """Whether there are events for the next turn, which follows at once."""
        return bool(self._posted)

    def kick(self) -> None:
        """Has the pump look soon."""
        self._wake.set()

    def later(self, seconds: float, call: Callable[[], object]) -> None:
        """Has the pump call something after a while."""
        with self.lock:
            heapq.heappush(self._later, (time.monotonic() + seconds, next(self._serial), call))
        self._wake.set()

    def check(self) -> None:
        """Raises once this rank is over."""
        if self._failure is not None:
            raise self._failure
        if self._over:
            raise errors.Unavailable(f"{self._name} is closed", reason="CLOSED")

    @property
    def over(self) -> bool:
        """Whether this rank is closed, or its session is over."""
        return self._over or self._failure is not None

    def ask(self, call: Callable[[], T]) -> Future[T]:
        """Has a helper make calls that take their time; in the order in which they are asked."""

        def helped() -> T:
            self._serves.now = True
            try:
                return call()
            except Exception as error:
                self._fail(error)
                raise
            finally:
                self._serve()

        try:
            return self._helpers.submit(helped)
        except RuntimeError:  # closed meanwhile
            if not self._over:
                raise
            return Future()

    def _fail(self, error: Exception) -> None:
        """Ends all: what has happened has no place in the protocol."""
        if not isinstance(error, errors.Unavailable):
            log.error("transferd.kv: %s has failed", self._name, exc_info=error)
        with self.lock:
            if self._failure is not None or self._over:
                return
            self._failure = (
                error
                if isinstance(error, errors.TransferdError)
                else errors.Internal(f"{self._name} has failed: {error}")
            )
            self._kind.failed(self._failure)
        self._wake.set()

    def _run(self) -> None:
        while True:
            self._wake.clear()
            try:
                with self.lock:
                    if self._over or self._failure is not None:
                        return
                    self._turn()
                    due = self._sleeps_until = self._due()
            except Exception as error:
                self._fail(error)
                return
            self._wake.wait(None if due is None else max(0.0, due - time.monotonic()))

    def _due(self) -> float | None:
        """Tells when there is something to do, if nothing comes."""
        due: float | None = self.core.due()
        if self._later and (due is None or self._later[0][0] < due):
            return self._later[0][0]
        return due

    def _turn(self) -> None:
        """Takes what has come, then what is due."""
        for _ in range(LETTERS_MAX):
            try:
                letter = self.mailbox.receive(timeout_s=0)
            except errors.WaitTimeout:
                break
            self.feed(self.core.receive(time.monotonic(), letter))
        else:
            self._wake.set()
        while self._posted:
            self.feed(self._posted.popleft()(time.monotonic()))
        while self._later and self._later[0][0] <= time.monotonic():
            heapq.heappop(self._later)[2]()
        self._reap_letters()
        self._kind.turn(time.monotonic())
        due = self.core.due()
        if due is not None and due <= time.monotonic():
            self.feed(self.core.tick(time.monotonic()))

    # ---- letters ----

    def _send(self, action: Send) -> None:
        def opened(error: Exception | None) -> None:
            if error is None:
                self._send_letters(action)
                return
            dead = not isinstance(error, errors.PeerLost | errors.WaitTimeout)
            self.feed(self.core.undelivered(time.monotonic(), action.key, dead=dead))

        self.when_open(action.mailbox, opened)

    def _send_letters(self, action: Send) -> None:
        sent = self._sent.setdefault(action.mailbox, deque())
        try:
            for letter in action.letters:
                job = self.client.send(
                    action.mailbox, letter, deadline_s=self._timeout_s, timeout_s=0
                )
                sent.append((job, action.key))
        except errors.WaitTimeout:  # the ring is full
            key = action.key
            self.post(lambda now: self.core.undelivered(now, key, dead=False))

    def _reap_letters(self) -> None:
        for mailbox, sent in list(self._sent.items()):
            while sent and sent[0][0].done():
                job, key = sent.popleft()
                if job.status is not JobStatus.OK:
                    self.feed(self.core.undelivered(time.monotonic(), key, dead=is_dead(job)))
            if not sent:
                del self._sent[mailbox]

    def when_open(self, descriptor: bytes, call: Callable[[Exception | None], None]) -> bool:
        """Calls once a descriptor is open, or cannot be opened; at once if it is. Under the lock.

        Returns:
            Whether it was open.
        """
        if descriptor in self.session.handles:
            call(None)
            return True
        waiting = self._opening.get(descriptor)
        if waiting is not None:
            waiting.append(call)
            return False
        self._opening[descriptor] = [call]
        self.ask(lambda: self._open([descriptor]))
        return False

    def open_ahead(self, descriptors: Iterable[bytes]) -> None:
        """Has descriptors opened in one call, for those who will need them. Under the lock."""
        known = self.session.handles
        missing = [d for d in descriptors if d not in known and d not in self._opening]
        if missing:
            self._opening.update((descriptor, []) for descriptor in missing)
            self.ask(lambda: self._open(missing))

    def _open(self, descriptors: list[bytes]) -> None:
        error: Exception | None = None
        try:
            self.client.warm(*descriptors)
        except errors.Unavailable:
            self.session.check_open()  # the own daemon's end is another matter
            error = errors.PeerLost("the daemon did not answer")
        except errors.TransferdError as found:
            error = found
        if error is not None and len(descriptors) > 1:  # which of them it is
            for descriptor in descriptors:
                self._open([descriptor])
            return

        def opened(_: float) -> list[Action]:
            for descriptor in descriptors:
                for call in self._opening.pop(descriptor, ()):
                    call(error)
            return []

        self.post(opened)

    # ---- the end ----

    def shut(self) -> None:
        """Ends thread, helpers and mailbox. Idempotent."""
        with self.lock:
            if self._over:
                return
            self._over = True
        self._wake.set()
        if threading.current_thread() is not self._thread and self._thread.ident is not None:
            self._thread.join(CLOSE_S)
        self._helpers.shutdown(wait=True, cancel_futures=True)
        with contextlib.suppress(errors.TransferdError):
            self.mailbox.close()
