"""Chat templates in the styles of the common families, and what is done for those that take less than others."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import pytest

from tests.fakes.llama import FakeLlama, FakeModel, FakeVocabulary
from wasi_nn_backend.errors import InvalidArgument
from wasi_nn_backend.llama.interface import ModelParams
from wasi_nn_backend.session import ChatTemplate, ChatTemplates, Message
from wasi_nn_backend.session.builtin_templates import BUILTIN_TEMPLATES, builtin_suited_to

USER, ASSISTANT = Message("user", "Hello"), Message("assistant", "Yes?")
SYSTEM = Message("system", "Be brief.")
TURNS = [USER, ASSISTANT, Message("user", "Bye")]

#: Refuses a system role and turns that do not alternate, as Gemma's and the first Mistral's templates do.
STRICT = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}[{{ message['role'] }}: {{ message['content'] | trim }}]"
    "{% endfor %}"
)
#: Passes over roles that it does not know.
SILENT = "{% for m in messages %}{% if m.role != 'system' %}[{{ m.content }}]{% endif %}{% endfor %}"
#: Of a model that also sees images: goes through parts, of which a text has none.
TYPED = (
    "{% for m in messages %}[{{ m.role }}{% for p in m.content %}{% if p.type == 'text' %} {{ p.text }}{% endif %}"
    "{% endfor %}]{% endfor %}"
)


def render(source: str, messages: Sequence[Message] = TURNS, **variables: Any) -> str:
    return ChatTemplate(source, bos_text="<s>", eos_text="</s>").render(messages, **variables)


class TestSystem:
    @pytest.mark.parametrize("source", [STRICT, SILENT])
    def test_a_template_without_a_system_role_gets_it_with_the_first_message(self, source: str) -> None:
        assert "Be brief.\n\nHello]" in render(source, [SYSTEM, *TURNS])
        assert "Be brief." not in render(source)

    def test_a_template_with_a_system_role_gets_it_as_it_is(self) -> None:
        assert render("{% for m in messages %}[{{ m.role }} {{ m.content }}]{% endfor %}", [SYSTEM, USER]) == (
            "[system Be brief.][user Hello]"
        )

    def test_a_system_message_alone(self) -> None:
        assert render(STRICT, [SYSTEM]) == "[user: Be brief.]"

    def test_what_a_template_refuses_besides_is_still_an_error(self) -> None:
        with pytest.raises(InvalidArgument, match="roles must alternate"):
            render(STRICT, [SYSTEM, USER, USER])


class TestContent:
    def test_parts_for_templates_that_see_only_parts(self) -> None:
        assert render(TYPED, [SYSTEM, USER]) == "[system Be brief.][user Hello]"

    def test_text_for_templates_that_take_either(self) -> None:
        source = "{% for m in messages %}{{ m.content if m.content is string else 'parts' }}{% endfor %}"
        assert render(source, [USER]) == "Hello"


class TestVariables:
    def test_what_is_not_set_is_undefined(self) -> None:
        names = ("tools", "documents", "enable_thinking", "date_string")
        source = "".join(f"{{{{ {name} is defined }}}}" for name in names)
        assert render(source) == "False" * 4

    def test_tools_and_thinking(self) -> None:
        source = "{{ tools[0].name }} {{ enable_thinking }}"
        assert render(source, tools=[{"name": "clock"}], enable_thinking=False) == "clock False"

    def test_whether_a_template_shows_tools(self) -> None:
        assert ChatTemplate("{{ tools | tojson }}{{ messages[0].content }}").shows_tools
        assert not ChatTemplate("{% if tools %}tools{% endif %}").shows_tools
        assert not ChatTemplate("{{ tools[0].nothing.there }}").shows_tools

    def test_a_template_cannot_change_what_others_see(self) -> None:
        tools = [{"name": "clock"}]
        for change in ("tools.append(1)", "tools[0].update(a=1)", "messages.clear()", "messages[0].pop('role')"):
            with pytest.raises(InvalidArgument, match="is not for templates"):
                render(f"{{{{ {change} }}}}", tools=tools)
        assert tools == [{"name": "clock"}]


class TestLanguage:
    """What templates are written with, beyond Jinja's everyday."""

    @pytest.mark.parametrize(
        ("source", "text"),
        [
            ("{% generation %}a{{ eos_token }}{% endgeneration %}", "a</s>"),
            (
                "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}",
                "3",
            ),
            ("{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}{{ m.role[0] }}{% endfor %}", "au"),
            ("{% for m in messages[::-1] %}{{ m.role[0] }}{% endfor %}{{ messages[1:] | length }}", "uau2"),
            ("{% macro f(x, n=2) %}<{{ x * n }}>{% endmacro %}{{ f('a') }}{{ f('b', n=1) }}", "<aa><b>"),
            ("{% macro f() %}({{ caller() }}){% endmacro %}{% call f() %}x{% endcall %}", "(x)"),
            ("{% set a %} b {% endset %}{{ a | trim }}{% filter upper %}c{% endfilter %}", "bC"),
            ("{% set x | trim | upper %} b {% endset %}{{ x }}", "B"),
            ("{{ 'a</think>b'.split('</think>')[-1].lstrip('\n') }}{{ 'x,y'.split(',') | join('-') }}", "bx-y"),
            (
                "{{ messages | selectattr('role', 'equalto', 'user') | map(attribute='content') | join(',') }}",
                "Hello,Bye",
            ),
            ("{{ messages | rejectattr('role', 'in', ['user']) | list | length }}", "1"),
            ("{% for k, v in {'b': 1, 'a': 2} | dictsort %}{{ k }}{{ v }}{% endfor %}", "a2b1"),
            ("{% for k, v in {'b': 1}.items() %}{{ k ~ v ~ none ~ 1.5 }}{% endfor %}", "b1None1.5"),
            ("{{ {'a': 1}.get('b', 'c') }}{{ messages[0].get('tool_calls') is none }}", "cTrue"),
            ("{% set j = joiner(', ') %}{{ j() }}a{{ j() }}b", "a, b"),
            ("{{ '{} and {name}'.format(1, name='x') }}{{ '{0}{0}'.format('y') }}", "1 and xyy"),
            ("{% if 'think' in 'thinking' and 1 is not string and {} is mapping %}y{% endif %}", "y"),
            ("{{ 'a\nb' | indent(2) }}|{{ 'aa' | replace('a', 'b') }}|{{ ' a ' | safe | length }}", "a\n  b|bb|3"),
            ("{{ '<a>' | e }}{{ [3, 1] | sort | first }}{{ [1, 1] | unique | list | length }}", "&lt;a&gt;11"),
            ("{{ range(3) | list }}{{ 7 // 2 }}{{ 7 % 4 }}{{ 2 ** 3 }}{{ -1 }}", "[0, 1, 2]338-1"),
            ("{{ 'x' if false }}{{ [1, 2, 3] | sum }}{{ 2.5 | round | int }}{{ ['a', 'b'] | last }}", "62b"),
            ("{% for i in [1, 2] recursive %}{{ i }}{% if i == 1 %}{{ loop([2]) }}{% endif %}{% endfor %}", "122"),
            (
                "{% for i in range(3) %}{{ loop.cycle('a', 'b') }}{% if not loop.last %},{% endif %}{% endfor %}",
                "a,b,a",
            ),
            ("{% with a = 1 %}{{ a }}{% endwith %}{% set a, b = 1, 2 %}{{ b }}", "12"),
        ],
    )
    def test_an_idiom(self, source: str, text: str) -> None:
        assert render(source) == text


class VocabularyOf(FakeVocabulary):
    """One that has these markers as tokens of their own, and letters besides."""

    def __init__(self, *markers: str) -> None:
        self._markers = markers

    def tokenize(self, text: bytes, *, add_special: bool, parse_special: bool) -> list[int]:
        return [300] if text.decode() in self._markers else list(text)


class TestBuiltin:
    @pytest.mark.parametrize("name", BUILTIN_TEMPLATES)
    def test_every_turn_and_the_system_prompt_are_in_the_prompt_in_order(self, name: str) -> None:
        template = ChatTemplate(BUILTIN_TEMPLATES[name].source, bos_text="<s>", eos_text="</s>")
        text = template.render([SYSTEM, *TURNS])
        places = [text.index(message.content) for message in (SYSTEM, *TURNS)]
        assert places == sorted(places)
        assert template.render(TURNS).startswith(template.render(TURNS[:1]).rstrip())

    @pytest.mark.parametrize(
        ("markers", "name"),
        [
            (("<|im_start|>", "<|im_end|>"), "chatml"),
            (("<start_of_turn>", "<end_of_turn>"), "gemma"),
            (("<|start_header_id|>", "<|eot_id|>"), "llama3"),
            (("<|user|>", "<|assistant|>", "<|end|>"), "phi3"),
            (("<|user|>", "<|assistant|>"), "zephyr"),
            (("[INST]", "[/INST]"), "mistral"),
            (("<|im_end|>",), "plain"),
            ((), "plain"),
        ],
    )
    def test_the_vocabulary_decides(self, markers: Collection[str], name: str) -> None:
        assert builtin_suited_to(VocabularyOf(*markers)) == name

    @pytest.mark.parametrize("name", BUILTIN_TEMPLATES)
    def test_an_answer_ends_at_a_marker_that_is_only_text(self, name: str) -> None:
        template = BUILTIN_TEMPLATES[name]
        assert template.stops_for(VocabularyOf()) == tuple(stop.encode() for stop in template.stops) != ()
        assert template.stops_for(VocabularyOf(*template.stops)) == ()


class TestSharing:
    def test_sessions_share_compiled_templates_up_to_a_number(self) -> None:
        model = FakeModel(FakeLlama(), ModelParams(__file__))  # type: ignore[arg-type]
        templates = ChatTemplates()
        own = templates.get(model, None)
        assert templates.get(model, "") is own
        assert templates.get(model, model.chat_template) is own
        for n in range(20):
            assert templates.get(model, f"{{{{ {n} }}}}").render(TURNS) == str(n)
        assert templates.get(model, "{{ 19 }}") is templates.get(model, "{{ 19 }}")
        assert templates.get(model, None).render(TURNS) == own.render(TURNS)
        assert templates.get(model, None) is not own
