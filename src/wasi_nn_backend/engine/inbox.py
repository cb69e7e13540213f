"""The door between an engine's thread and all others: commands go in, the engine's thread takes them between steps.

So the scheduler and the KV accounting need no locks.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import TypeVar

from wasi_nn_backend.errors import RuntimeFailure
from wasi_nn_backend.home_process import HomeProcess

__all__ = ["Inbox"]

_log = logging.getLogger(__name__)

#: From so many on, announcements that nobody waits for any more are looked for: a guest may announce without end.
_N_EXPECTED_KEPT = 64

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class _Announcement:
    announced_s: float
    thread_id: int


class Inbox:
    """``send``, ``post``, ``ask``, ``expect``, ``dismiss`` and ``close``: any thread. ``take`` and ``carry_out``: the
    engine's.

    The commands are in a ``SimpleQueue``, since its ``put`` may interrupt everything, itself included. A condition's
    lock would have the garbage collector, which can run in whoever holds it, lose a command or wait for itself.

    ``company_wait_s`` is the longest that a batch which has not begun waits for prompts that are announced.
    """

    def __init__(self, clock: Callable[[], float], company_wait_s: float = 0.0) -> None:
        self._clock = clock
        self._company_wait_s = company_wait_s
        self._commands: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._expected: dict[int, _Announcement] = {}  # by session id
        self._lock = threading.RLock()  # a signal handler may find its own thread in it
        self._closing = False
        self._home = HomeProcess()

    @property
    def is_foreign(self) -> bool:
        """Whether this is a forked child: the engine's thread stayed behind in the parent."""
        return self._home.is_left

    def send(self, command: Callable[[], None], session_id: int | None = None) -> None:
        """Leave a command. ``session_id`` is whose prompt it submits: that is no longer expected, and neither is what
        else this thread has announced, since it waits for its text now. Raises ``RuntimeFailure`` when closed."""
        self._home.check()
        with self._lock:
            if self._closing:
                raise RuntimeFailure("the engine is closed: its graph was unloaded or the backend was closed")
            if session_id is not None and self._expected:
                self._expected.pop(session_id, None)
                own = threading.get_ident()
                self._expected = {s: each for s, each in self._expected.items() if each.thread_id != own}
            self._commands.put(command)

    def post(self, command: Callable[[], None]) -> None:
        """``send`` for what a closing engine does anyway, in the middle of anything: takes no lock, never raises."""
        self._commands.put(command)

    def ask(self, question: Callable[[], _T]) -> Future[_T]:
        """Have the engine's thread work something out between two steps."""
        answer: Future[_T] = Future()

        def carry_out() -> None:
            try:
                answer.set_result(question())
            except BaseException as error:  # raised again where the answer is asked for
                answer.set_exception(error)

        self.send(carry_out)
        return answer

    def expect(self, session_id: int) -> None:
        """A session has its next prompt and will submit it soon: who comes just before it may wait for it."""
        if self._company_wait_s > 0:
            with self._lock:
                if len(self._expected) >= _N_EXPECTED_KEPT:
                    self._forget_the_late()
                self._expected[session_id] = _Announcement(self._clock(), threading.get_ident())

    def dismiss(self, session_id: int) -> None:
        """Expect a session no longer."""
        with self._lock:
            if self._expected.pop(session_id, None) is not None:
                self._commands.put(_look_again)

    def close(self) -> bool:
        """Refuse what comes from now on. False when that was so before."""
        with self._lock:
            was_open, self._closing = not self._closing, True
        self._commands.put(_look_again)
        return was_open

    def take(self, has_work: Callable[[], bool]) -> bool:
        """Carry out what has come, waiting for it when there is nothing else to do. False when closing."""
        while self._commands.empty() and not (self._closing or has_work()):
            _carry_out(self._commands.get())
        closing = self._closing
        self.carry_out()
        return not closing

    def wait_for_company(self) -> None:
        """Let announced sessions submit, as long as a batch may wait for them."""
        if not self._expected:
            return
        start_s = self._clock()
        while True:
            with self._lock:
                self._forget_the_late()
                remaining_s = start_s + self._company_wait_s - self._clock()
                if self._closing or not self._expected or remaining_s <= 0:
                    break
            try:
                command = self._commands.get(timeout=remaining_s)
            except Empty:
                break
            _carry_out(command)
        self.carry_out()

    def carry_out(self) -> None:
        """What has come until now: who sends without end does not keep the engine from its steps."""
        for _ in range(self._commands.qsize()):
            _carry_out(self._commands.get())

    def _forget_the_late(self) -> None:
        """Who announced a prompt and then went elsewhere is not waited for again."""
        now_s = self._clock()
        late = [s for s, each in self._expected.items() if now_s - each.announced_s >= self._company_wait_s]
        for session_id in late:
            del self._expected[session_id]


def _carry_out(command: Callable[[], None]) -> None:
    try:
        command()
    except Exception:  # a fault of this package: it must not end everybody's session
        _log.exception("a command to the engine failed")


def _look_again() -> None:
    """The command that only wakes the engine's thread."""
