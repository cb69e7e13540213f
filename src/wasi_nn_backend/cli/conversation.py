"""The loop of ``wasi-nn chat``: messages to the model, ``/commands`` to the loop."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Protocol

from wasi_nn_backend.cli.answer import Answer, AnsweringContext
from wasi_nn_backend.cli.exit_codes import describe, print_error
from wasi_nn_backend.cli.generate import print_answer
from wasi_nn_backend.cli.interrupts import Cancellation, run_interruptibly
from wasi_nn_backend.errors import WasiNNError

__all__ = ["Conversation", "converse"]

_HELP = """\
/reset  forget the conversation (the system message stays)
/stats  numbers of the last answer and of the whole conversation
/help   this list
/exit   end, as Ctrl-D does
Everything else is a message. Ctrl-C stops an answer."""


class ResettableContext(AnsweringContext, Protocol):
    """The part of ``ExecutionContext`` that a conversation needs."""

    def reset(self) -> None: ...


class Conversation:
    """An execution context that remembers what was said, and the numbers of its answers."""

    def __init__(self, context: ResettableContext) -> None:
        self._context = context
        self._n_answers = 0
        self._n_answer_tokens = 0
        self._last: Answer | None = None

    def answer(self, message: str) -> Answer:
        """Print the model's answer while it comes. Raises ``KeyboardInterrupt`` when Ctrl-C cut it short."""
        prompt = message.encode("utf-8", errors="surrogateescape")

        def work(cancellation: Cancellation) -> Answer:
            answer = print_answer(self._context, prompt, cancellation, as_json=False)
            # Recorded here, since an answer that Ctrl-C cut short counts and is not returned.
            self._last = answer
            self._n_answers += 1
            self._n_answer_tokens += answer.n_tokens
            return answer

        return run_interruptibly(work)

    def reset(self) -> None:
        self._context.reset()
        self._n_answers = self._n_answer_tokens = 0
        self._last = None

    def statistics(self) -> str:
        if self._last is None:
            return "no answer yet"
        return (
            f"last answer: {self._last.summary()}\nanswers so far: {self._n_answers}, of {self._n_answer_tokens} tokens"
        )


def converse(conversation: Conversation, messages: Iterable[str], *, interactive: bool, stats: bool) -> None:
    """Answer message after message until they end or one says ``/exit``.

    At a terminal an error or Ctrl-C costs one answer. With piped messages both end the command, since nobody is there
    to decide: they are raised.
    """
    for message in messages:
        text = message.strip()
        if text == "/exit":
            return
        if not text or _obeyed(text, conversation):
            continue
        try:
            answer = conversation.answer(message)
        except (KeyboardInterrupt, WasiNNError) as problem:
            if not interactive:
                raise
            _explain(problem)
        else:
            if stats:
                _note(answer.summary())


def _obeyed(text: str, conversation: Conversation) -> bool:
    """Carry out a command; False for a message. A line with a blank or a second slash, such as a path, is a message."""
    if not text.startswith("/") or not text[1:].isalpha():
        return False
    if text == "/reset":
        conversation.reset()
        _note("the conversation is forgotten")
    elif text == "/stats":
        _note(conversation.statistics())
    elif text == "/help":
        _note(_HELP)
    else:
        _note(f"no command {text}; /help lists them")
    return True


def _explain(problem: KeyboardInterrupt | WasiNNError) -> None:
    if isinstance(problem, KeyboardInterrupt):
        _note("(stopped)")
    else:
        print_error(describe(problem))
        _note("/reset begins a new conversation")


def _note(text: str) -> None:
    """On stderr: stdout holds the model's words only."""
    print(text, file=sys.stderr)
