"""A conversation and its prompt: what becomes history, and chat templates out of untrusted model files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.conftest import n_examples
from tests.fakes.llama import BOS, IM_END, IM_START, FakeLlama, FakeModel
from wasi_nn_backend.config import Settings
from wasi_nn_backend.config.session import SessionSettings
from wasi_nn_backend.errors import InvalidArgument
from wasi_nn_backend.llama.interface import ModelParams
from wasi_nn_backend.session import ChatTemplate, Message, Session

HELLO = [Message("user", "Hello")]

N_TOKENS_MAX = 10_000


def settings_of(**session: Any) -> Settings:
    return Settings(session=SessionSettings(**session))


def text_of(model: FakeModel, tokens: Sequence[int]) -> str:
    return b"".join(model.vocabulary.piece(token, special=True) for token in tokens).decode()


def render(source: str, messages: Sequence[Message] = HELLO) -> str:
    return ChatTemplate(source, bos_text="<s>", eos_text="</s>").render(messages)


@pytest.fixture
def model(tmp_path: Path) -> FakeModel:
    path = tmp_path / "fake.gguf"
    path.touch()
    return FakeLlama().load_model(ModelParams(path))


class TestHistory:
    def test_computing_twice_replaces_the_last_turn(self, model: FakeModel) -> None:
        session = Session(1, "chat")
        plain = settings_of()
        session.set_input(b"Q1")
        prompt = session.prompt(model, plain, N_TOKENS_MAX)
        session.finish_turn(prompt, b"first")
        again = session.prompt(model, plain, N_TOKENS_MAX)
        assert again.tokens == prompt.tokens
        session.finish_turn(again, b"second")
        assert session.messages == (Message("user", "Q1"), Message("assistant", "second"))

    def test_finished_turns_are_in_the_next_prompt(self, model: FakeModel) -> None:
        session = Session(1, "chat")
        session.set_input(b"Q1")
        session.finish_turn(session.prompt(model, settings_of(), N_TOKENS_MAX), b"A1")
        session.set_input(b"Q2")
        prompt = session.prompt(model, settings_of(system_prompt="Be kind"), N_TOKENS_MAX)
        assert text_of(model, prompt.tokens) == (
            "<s><|im_start|>system\nBe kind<|im_end|>\n<|im_start|>user\nQ1<|im_end|>\n"
            "<|im_start|>assistant\nA1<|im_end|>\n<|im_start|>user\nQ2<|im_end|>\n<|im_start|>assistant\n"
        )
        assert prompt.turn == (*session.messages, Message("user", "Q2"))

    def test_an_unanswered_input_is_replaced(self, model: FakeModel) -> None:
        session = Session(1, "chat")
        session.set_input(b"Q1")
        session.prompt(model, settings_of(), N_TOKENS_MAX)
        session.set_input(b"Q2")
        assert session.prompt(model, settings_of(), N_TOKENS_MAX).turn == (Message("user", "Q2"),)
        assert session.messages == ()

    def test_raw_prompts_leave_no_history_and_get_no_template(self, model: FakeModel) -> None:
        session = Session(1, "raw")
        session.set_input(b"<|im_start|>x")
        prompt = session.prompt(model, settings_of(), N_TOKENS_MAX)
        assert prompt.tokens == [BOS, IM_START, ord("x")]
        session.finish_turn(prompt, b"A")
        assert session.messages == ()
        assert session.prompt(model, settings_of(prompt_mode="chat"), N_TOKENS_MAX).turn == (
            Message("user", "<|im_start|>x"),
        )

    def test_a_raw_prompt_between_turns_leaves_them_alone(self, model: FakeModel) -> None:
        session = Session(1, "chat")
        session.set_input(b"Q1")
        session.finish_turn(session.prompt(model, settings_of(), N_TOKENS_MAX), b"A1")
        turns = session.messages
        session.set_input(b"raw")
        session.finish_turn(session.prompt(model, settings_of(prompt_mode="raw"), N_TOKENS_MAX), b"A")
        assert session.messages == turns

    def test_clearing_forgets_everything(self, model: FakeModel) -> None:
        session = Session(1, "chat")
        session.set_input(b"Q1")
        session.finish_turn(session.prompt(model, settings_of(), N_TOKENS_MAX), b"A1")
        session.clear()
        assert (session.messages, session.has_input) == ((), False)
        with pytest.raises(InvalidArgument, match="set_input"):
            session.prompt(model, settings_of(), N_TOKENS_MAX)

    def test_new_settings_make_a_new_prompt(self, model: FakeModel) -> None:
        session = Session(1, "chat")
        session.set_input(b"Q")
        before = session.prompt(model, settings_of(), N_TOKENS_MAX)
        after = session.prompt(model, settings_of(chat_template="{{ messages[0].content }}!"), N_TOKENS_MAX)
        assert text_of(model, after.tokens) == "<s>Q!"
        assert session.prompt(model, settings_of(), N_TOKENS_MAX).tokens == before.tokens

    def test_a_prompt_without_tokens_is_refused(self, model: FakeModel, monkeypatch: pytest.MonkeyPatch) -> None:
        session = Session(1, "chat")
        session.set_input(b"Q")
        monkeypatch.setattr(model.vocabulary, "tokenize", lambda text, **_: [])  # as one that adds no first token
        with pytest.raises(InvalidArgument, match="no tokens"):
            session.prompt(model, settings_of(chat_template="{{ '' }}"), N_TOKENS_MAX)

    @settings(derandomize=True, deadline=None, max_examples=n_examples(60))
    @given(st.lists(st.sampled_from(["input", "compute"]), max_size=12))
    def test_any_order_of_inputs_and_computes(self, calls: list[str]) -> None:
        """Against the obvious: the answered turns in order, the last of them as answered last."""
        session, turns, pending = Session(1, "chat"), [], None
        model = FakeModel(FakeLlama(), ModelParams(Path("fake.gguf")))
        for n, call in enumerate(calls):
            if call == "input":
                session.set_input(f"Q{n}".encode())
                pending, is_answered = f"Q{n}", False
            elif pending is not None:
                prompt = session.prompt(model, settings_of(), N_TOKENS_MAX)
                session.finish_turn(prompt, f"A{n}".encode())
                turns[len(turns) - 2 * is_answered :] = [Message("user", pending), Message("assistant", f"A{n}")]
                is_answered = True
            assert session.messages == tuple(turns)


class TestTokens:
    def test_the_first_token_is_not_doubled(self, model: FakeModel) -> None:
        session = Session(1, "chat")
        session.set_input(b"Q")
        with_bos = session.prompt(
            model, settings_of(chat_template="{{ bos_token }}{{ messages[0].content }}"), N_TOKENS_MAX
        )
        without = session.prompt(model, settings_of(chat_template="{{ messages[0].content }}"), N_TOKENS_MAX)
        assert with_bos.tokens == without.tokens == [BOS, ord("Q")]

    def test_invalid_utf8_in_a_prompt_is_replaced_in_chat_and_kept_in_raw_mode(self, model: FakeModel) -> None:
        session = Session(1, "chat")
        session.set_input(b"\xff")
        chat = session.prompt(model, settings_of(chat_template="{{ messages[0].content }}"), N_TOKENS_MAX)
        assert text_of(model, chat.tokens) == "<s>\N{REPLACEMENT CHARACTER}"
        assert session.prompt(model, settings_of(prompt_mode="raw"), N_TOKENS_MAX).tokens == [BOS, 0xFF]

    def test_an_answer_in_invalid_utf8_is_kept_as_text(self, model: FakeModel) -> None:
        session = Session(1, "chat")
        session.set_input(b"Q")
        session.finish_turn(session.prompt(model, settings_of(), N_TOKENS_MAX), b"a\xe2\x82")
        assert session.messages[-1] == Message("assistant", "a\N{REPLACEMENT CHARACTER}")

    def test_half_a_surrogate_pair_from_a_template_is_replaced(self, model: FakeModel) -> None:
        session = Session(1, "chat")
        session.set_input(b"Q")
        assert (
            text_of(model, session.prompt(model, settings_of(chat_template=r'{{ "\ud800" }}'), N_TOKENS_MAX).tokens)
            == "<s>?"
        )

    def test_a_model_without_a_template_gets_chatml(self, model: FakeModel) -> None:
        model.chat_template = None
        session = Session(1, "chat")
        session.set_input(b"Q")
        tokens = session.prompt(model, settings_of(), N_TOKENS_MAX).tokens
        assert text_of(model, tokens) == "<s><|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n"
        assert (tokens.count(IM_START), tokens.count(IM_END)) == (2, 1)


class TestTemplates:
    @pytest.mark.parametrize(
        "source",
        [
            "{{ ''.__class__ }}",
            "{{ ''.__class__.__mro__ }}",
            "{{ ''['__class__'] }}",
            "{{ ''|attr('__class__') }}",
            "{{ '{0.__class__}'.format(messages) }}",
            "{{ '{x.__class__}'.format_map({'x': messages}) }}",
            "{{ messages.__class__ }}",
            "{{ messages[0].__class__.__base__.__subclasses__() }}",
            "{{ messages|map(attribute='__class__')|list }}",
            "{{ messages|groupby('__class__')|list }}",
            "{{ cycler.__init__.__globals__ }}",
            "{{ cycler('a').items.__class__ }}",
            "{{ joiner.__init__.__globals__.os }}",
            "{{ namespace.__init__ }}",
            "{% set ns = namespace(x=1) %}{{ ns._Namespace__attrs }}",
            "{{ lipsum.__globals__['os'] }}",
            "{{ range.__globals__ }}",
            "{{ raise_exception.__globals__ }}",
            "{{ joiner().__init__ }}",
            "{{ dict.mro() }}",
            "{{ namespace.__init__.__globals__ }}",
            "{{ ''.join.__self__ }}",
            "{{ 'a'.format.__wrapped__ }}",
            "{{ messages|map('attr', '__class__')|list }}",
            "{{ messages|selectattr('__class__')|list }}",
            "{{ [messages]|map(attribute='0.__class__')|list }}",
            "{{ messages|join(attribute='__class__') }}",
            "{{ messages|sort(attribute='__class__') }}",
            "{{ (messages|map('upper')).gi_frame }}",
            "{{ ('a'|map('list')).__class__ }}",
            "{{ strftime_now.__code__ }}",
            "{{ self._TemplateReference__context }}",
            "{{ self.__init__.__globals__ }}",
            "{{ loop.__class__ }}{% for m in messages %}{{ loop.__class__ }}{% endfor %}",
            "{% macro m() %}{% endmacro %}{{ m._invoke }}",
            "{% macro m() %}{{ caller._func }}{% endmacro %}{% call m() %}{% endcall %}",
        ],
    )
    def test_there_is_no_way_to_pythons_internals(self, source: str) -> None:
        with pytest.raises(InvalidArgument, match=r"is not for templates|undefined"):
            render(source)

    @pytest.mark.parametrize(
        "source",
        [
            "{{ messages.append(1) }}",
            "{{ messages[0].update(role='system') }}",
            "{{ messages.clear() }}",
            "{% include 'secret' %}",
            "{% import 'secret' as s %}",
            "{% extends 'secret' %}",
            "{% for i in range(10 ** 6) %}{% endfor %}",
            "{{ 1 / 0 }}",
            "{{ nobody.knows }}",
            "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
            "{{ strftime_now(5) }}",
            "{{ messages|tojson(colour='red') }}",
        ],
    )
    def test_what_fails_while_rendering_is_the_callers_error(self, source: str) -> None:
        with pytest.raises(InvalidArgument, match=r"the chat template failed: .*set session\.chat_template"):
            render(source)

    @pytest.mark.parametrize(
        "source",
        [
            "{% if %}",
            "{{ messages",
            "{% nonsense %}",
            "{{ 'a'|nofilter }}",
            "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
            "{{ " + "-" * 50_000 + "1 }}",
            "{{ " + "1" * 5000 + " }}",
            "{% for a in [1] %}" * 25 + "{% endfor %}" * 25,
        ],
        ids=lambda source: source[:20],
    )
    def test_what_does_not_compile_is_the_callers_error(self, source: str) -> None:
        with pytest.raises(InvalidArgument, match=r"the chat template is not valid: .*set session\.chat_template"):
            render(source)

    def test_a_failing_template_changes_nothing_for_the_next(self) -> None:
        messages = [Message("user", "Hello")]
        with pytest.raises(InvalidArgument):
            render("{{ messages[0].update(content='gone') }}", messages)
        assert render("{{ messages[0].content }}", messages) == "Hello"

    def test_a_template_refuses_messages_in_its_own_words(self) -> None:
        with pytest.raises(InvalidArgument, match="does not take these messages: no system here"):
            render("{{ raise_exception('no system here') }}")

    def test_json_is_written_as_models_have_seen_it(self) -> None:
        value = [Message("user", "<é> & 'x'")]
        assert render("{{ messages[0]|tojson }}", value) == '{"role": "user", "content": "<é> & \'x\'"}'
        assert render("{{ messages|tojson(indent=2) }}", value) == json.dumps(
            [{"role": "user", "content": "<é> & 'x'"}], indent=2, ensure_ascii=False
        )
        assert render("{{ {'b': 'é', 'a': 1}|tojson(ensure_ascii=True, sort_keys=True, separators=(',', ':')) }}") == (
            '{"a":1,"b":"\\u00e9"}'
        )

    def test_a_template_without_a_generation_prompt(self) -> None:
        assert render("{% for m in messages %}[{{ m.role }}] {{ m.content }}{{ eos_token }}{% endfor %}") == (
            "[user] Hello</s>"
        )

    def test_blocks_leave_no_white_space(self) -> None:
        assert render("  {% if add_generation_prompt %}\nyes\n  {% endif %}\n") == "yes\n"

    def test_loops_can_be_left(self) -> None:
        messages = [Message("user", "a"), Message("assistant", "b"), Message("user", "c")]
        source = "{% for m in messages %}{% if loop.index == 2 %}{% break %}{% endif %}{{ m.content }}{% endfor %}"
        assert render(source, messages) == "a"

    def test_undefined_variables_are_false_and_empty(self) -> None:
        assert render("{% if tools %}tools{% endif %}{{ date_string }}|") == "|"

    def test_todays_year(self) -> None:
        assert render("{{ strftime_now('%Y') }}").isdigit()
