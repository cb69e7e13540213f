"""The loop of the chat, and one answer as it streams, over a context that answers from a script."""

from __future__ import annotations

import io
import itertools
import json
import sys
from collections.abc import Callable, Iterator
from functools import partial

import pytest

from tests.cli.doubles import ScriptedContext
from tests.cli.test_interrupts import press_ctrl_c
from wasi_nn_backend.cli import generate
from wasi_nn_backend.cli.conversation import Conversation, converse
from wasi_nn_backend.cli.generate import print_answer
from wasi_nn_backend.cli.interrupts import Cancellation
from wasi_nn_backend.cli.terminal import waiting_line
from wasi_nn_backend.errors import Cancelled, ContextFull

Captured = pytest.CaptureFixture[str]


def ctrl_c_at_the_second_call() -> Callable[[], None]:
    n_call = itertools.count(1)

    def on_piece() -> None:
        if next(n_call) == 2:
            press_ctrl_c()

    return on_piece


def chat(context: ScriptedContext, *messages: str, interactive: bool = False, stats: bool = False) -> None:
    converse(Conversation(context), messages, interactive=interactive, stats=stats)


def test_answers_are_all_that_stdout_gets(capsys: Captured) -> None:
    context = ScriptedContext(["Hel", "lo"])
    chat(context, "Hi", "", "  ", "/stats", "/help", "/nonsense", "/home/me is a path", "/exit", "never sent")
    assert context.prompts == [b"Hi", b"/home/me is a path"]
    captured = capsys.readouterr()
    assert captured.out == "Hello\nHello\n"
    assert "no command /nonsense" in captured.err
    assert "/reset" in captured.err
    assert "7 prompt tokens, 2 answer tokens, 1.0 tokens/s, first token after 0.50 s, ended by stop" in captured.err


def test_reset_forgets_context_and_statistics(capsys: Captured) -> None:
    context = ScriptedContext(["x"])
    chat(context, "Hi", "/reset", "/stats")
    assert context.n_resets == 1
    assert "no answer yet" in capsys.readouterr().err


def test_statistics_add_up(capsys: Captured) -> None:
    chat(ScriptedContext(["a", "b"]), "1", "2", "3", "/stats")
    assert "answers so far: 3, of 6 tokens" in capsys.readouterr().err


def test_stats_follow_each_answer_when_asked_for(capsys: Captured) -> None:
    chat(ScriptedContext(["a"]), "1", "2", stats=True)
    assert capsys.readouterr().err.count("answer tokens") == 2


def test_at_a_terminal_an_error_costs_one_answer(capsys: Captured) -> None:
    context = ScriptedContext(["so far", ContextFull("the window is full")])
    chat(context, "1", "2", interactive=True)
    captured = capsys.readouterr()
    assert len(context.prompts) == 2
    assert captured.out == "so far\nso far\n"
    assert captured.err.count("error: the window is full (code context_full)\n") == 2


def test_a_pipe_ends_with_the_first_error() -> None:
    context = ScriptedContext([ContextFull("the window is full")])
    with pytest.raises(ContextFull):
        chat(context, "1", "2")
    assert context.prompts == [b"1"]


def test_ctrl_c_costs_one_answer_at_a_terminal(capsys: Captured) -> None:
    """The script would go on for ever; what ends it is the cancel."""
    context = ScriptedContext(itertools.chain(["first"], itertools.repeat("")), on_piece=ctrl_c_at_the_second_call())
    chat(context, "1", "/stats", interactive=True)
    captured = capsys.readouterr()
    assert captured.out == "first\n"
    assert "(stopped)" in captured.err
    assert "ended by cancelled" in captured.err


def test_ctrl_c_ends_a_pipe() -> None:
    context = ScriptedContext(itertools.chain(["first"], itertools.repeat("")), on_piece=ctrl_c_at_the_second_call())
    with pytest.raises(KeyboardInterrupt):
        chat(context, "1", "2")
    assert context.prompts == [b"1"]


def test_json_is_one_object_with_text_and_metadata(capsys: Captured) -> None:
    print_answer(ScriptedContext(["Grüß", " Gott"]), b"Hi", Cancellation(), as_json=True)
    answer = json.loads(capsys.readouterr().out)
    assert answer["text"] == "Grüß Gott"
    assert answer["metadata"]["output_tokens"] == 2
    assert answer["tokens_per_s"] == 1.0


def test_a_newline_ends_the_answer_once(capsys: Captured) -> None:
    print_answer(ScriptedContext(["a\n"]), b"Hi", Cancellation(), as_json=False)
    print_answer(ScriptedContext([]), b"Hi", Cancellation(), as_json=False)
    print_answer(ScriptedContext(["b", ""]), b"Hi", Cancellation(), as_json=False)
    assert capsys.readouterr().out == "a\nb\n"


def test_a_cancel_from_elsewhere_is_an_error() -> None:
    with pytest.raises(Cancelled):
        print_answer(ScriptedContext([Cancelled("the graph was closed")]), b"Hi", Cancellation(), as_json=False)


class Screen(io.StringIO):
    """A terminal that stdout and stderr share."""

    def isatty(self) -> bool:
        return True


class ManualTimer:
    """A timer that fires when the test says so, once."""

    def __init__(self) -> None:
        self._actions: list[Callable[[], None]] = []
        self.is_cancelled = False

    def start(self, _delay_s: float, action: Callable[[], None]) -> ManualTimer:
        self._actions.append(action)
        return self

    def cancel(self) -> None:
        self.is_cancelled = True

    def fire(self) -> None:
        while self._actions:
            self._actions.pop()()


@pytest.fixture
def timer(monkeypatch: pytest.MonkeyPatch) -> ManualTimer:
    timer = ManualTimer()
    monkeypatch.setattr(generate, "waiting_line", partial(waiting_line, start_timer=timer.start))
    return timer


def shown(monkeypatch: pytest.MonkeyPatch, context: ScriptedContext, *, as_json: bool, term: str = "xterm") -> str:
    screen = Screen()
    with monkeypatch.context() as patch:
        patch.setenv("TERM", term)
        patch.setattr(sys, "stdout", screen)
        patch.setattr(sys, "stderr", screen)
        print_answer(context, b"Hi", Cancellation(), as_json=as_json)
    return screen.getvalue()


@pytest.mark.parametrize(("as_json", "label"), [(False, "Reading the prompt"), (True, "Answering")])
def test_a_terminal_shows_that_it_waits_until_there_is_an_answer(
    monkeypatch: pytest.MonkeyPatch, timer: ManualTimer, as_json: bool, label: str
) -> None:
    plain = shown(monkeypatch, ScriptedContext(["Hel", "lo"]), as_json=as_json)
    assert "\x1b" not in plain
    with_line = shown(monkeypatch, ScriptedContext(["Hel", "lo"], on_piece=timer.fire), as_json=as_json)
    before, _, after = with_line.rpartition("\x1b[2K")  # the line is erased
    assert label in before
    assert after == plain
    assert timer.is_cancelled


def test_a_line_that_has_ended_is_not_shown(monkeypatch: pytest.MonkeyPatch, timer: ManualTimer) -> None:
    """The timer's thread may be late."""

    def late() -> Iterator[str]:
        yield "Hel"
        timer.fire()
        yield "lo"

    assert shown(monkeypatch, ScriptedContext(late()), as_json=False) == "Hello\n"


def test_a_terminal_that_cannot_draw_shows_the_answer_only(monkeypatch: pytest.MonkeyPatch, timer: ManualTimer) -> None:
    context = ScriptedContext(["Hello"], on_piece=timer.fire)
    assert shown(monkeypatch, context, as_json=False, term="dumb") == "Hello\n"
