"""Templates that would run for ever or fill the memory are stopped early, and real ones do not notice."""

from __future__ import annotations

import itertools
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from wasi_nn_backend.errors import InvalidArgument
from wasi_nn_backend.session import ChatTemplate, Message

HELLO = [Message("user", "Hello")]
_N_BYTES_PEAK_MAX = 100 << 20

LOOP = "{% for i in range(90000) %}"
LARGE = "{% set a = 'a\n' * 200000 %}"


def grown(start: str, step: str, end: str) -> str:
    """A value that is made anew from itself a hundred times."""
    return (
        "{% set ns = namespace(x=" + start + ") %}"
        "{% for i in range(100) %}{% set ns.x = " + step + " %}{% endfor %}" + end
    )


STOPPED = {
    "nested loops": LOOP * 3 + "{% endfor %}" * 3,
    "loops that leave everything out": LOOP + "{% for j in range(90000) if false %}{% endfor %}{% endfor %}",
    "text in loops": LOOP * 2 + "z" * 1000 + "{% endfor %}" * 2,
    "text in loops, kept": "{% set y %}" + LOOP * 2 + "z" * 1000 + "{% endfor %}" * 2 + "{% endset %}",
    "a loop that calls itself": "{% for a in [1, 2] recursive %}"
    + LOOP
    + "{{ loop.index }}{% endfor %}{% endfor %}" * 1,
    "macros that call themselves twice": (
        "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(60) }}"
    ),
    "a text many times": "{{ 'x' * 10 ** 10 }}",
    "many times a text": "{{ 10 ** 10 * 'x' }}",
    "a list many times": "{{ [0] * 10 ** 10 }}",
    "a large power": "{{ 10 ** (10 ** 10) }}",
    "squares": grown("3", "ns.x * ns.x", "{{ ns.x }}"),
    "long numbers": "{{ ('9' * 4000) | int * ('9' * 4000) | int }}",
    "a doubled text": grown("'x'", "ns.x ~ ns.x", "{{ ns.x }}"),
    "an added text": grown("'x'", "ns.x + ns.x", "{{ ns.x }}"),
    "an added list": grown("[1]", "ns.x + ns.x", "{{ ns.x }}"),
    "a list of a list": grown("[1]", "[ns.x, ns.x]", "{{ ns.x }}"),
    "a tuple of a tuple": grown("(1,)", "(ns.x, ns.x)", "{{ ns.x == ns.x }}"),
    "an object of an object": grown("{}", "{'a': ns.x, 'b': ns.x}", "{{ ns.x | tojson }}"),
    "views of an object": grown("{}", "{'a': ns.x.items(), 'b': ns.x.values()}", "{{ ns.x }}"),
    "dict() of dict()": grown("{}", "dict(a=ns.x, b=ns.x)", "{{ ns.x | tojson }}"),
    "named arguments": (
        "{% macro m(n) %}{% if n %}{{ m(n - 1, a=kwargs, b=kwargs) }}{% else %}{{ kwargs }}{% endif %}{% endmacro %}"
        "{{ m(200, a=1) }}"
    ),
    "further arguments": (
        "{% macro m(n) %}{% if n %}{{ m(n - 1, varargs, varargs) }}{% else %}{{ varargs }}{% endif %}{% endmacro %}"
        "{{ m(200, 1) }}"
    ),
    "a namespace in itself": "{% set a = namespace() %}{% set a.x = a %}{{ a }}",
    "a namespace in a list": "{% set a = namespace() %}{% set a.x = [a] %}{{ a }}",
    "a namespace in a namespace": "{% set a = namespace() %}{{ namespace(x=a) }}",
    "kept blocks": "{% set ns = namespace(x='x') %}" + LOOP + "{% set y %}{{ ns.x }}{{ ns.x }}{% endset %}"
    "{% set ns.x = y %}{% endfor %}",
    "replace": LARGE + "{{ a.replace('a', a) }}",
    "the filter replace": LARGE + "{{ a | replace('', a) }}",
    "join": LARGE + "{{ a.join(a) }}",
    "the filter join": LARGE + "{{ range(90000) | join(a) }}",
    "map": LARGE + "{{ range(90000) | map('attr', 'x') | map('default', a) | list }}",
    "format": LARGE + "{{ ('{0}' * 100000).format(a) }}",
    "indent": "{{ 'a\nb' | indent(10 ** 9) }}",
    "indent with a text": LARGE + "{{ a | indent(a) }}",
    "tojson": "{{ [1] | tojson(indent=10 ** 9) }}",
    "characters": "{% set a = '☃' * 3000000 %}{{ a | list | length }}",
    "characters, as map would": "{% set a = '☃' * 3000000 %}{{ [a] | map('list') | list | length }}",
    "words": "{% set a = 'a ' * 2000000 %}{{ a.split() | length }}",
    "sums of lists": "{{ ([[1]] * 9000) | sum(start=[]) }}",
    "digits": "{{ 1.5 | round(10 ** 9, 'floor') }}",
    "many texts": "{% set a = 'x' * 1000000 %}" + "".join(f"{{% set a{n} = a[1:] %}}" for n in range(300)),
    "many elements": "{% set a = [0] * 9000 %}" + LOOP + "{% set b = a | select | list %}{% endfor %}",
}


@contextmanager
def takes_at_most(n_bytes: int) -> Iterator[None]:
    """Bounds the block's memory at its peak: the kernel's figure, since tracemalloc makes these templates ten times as
    slow; that one where the kernel has none."""
    forget_peak, status = Path("/proc/self/clear_refs"), Path("/proc/self/status")
    if not forget_peak.exists():
        tracemalloc.start()
        try:
            yield
            assert tracemalloc.get_traced_memory()[1] < n_bytes
        finally:
            tracemalloc.stop()
        return

    def resident(name: str) -> int:
        [line] = [line for line in status.read_text().splitlines() if line.startswith(name)]
        return int(line.split()[1]) * 1024

    forget_peak.write_text("5")
    before = resident("VmRSS:")
    yield
    assert resident("VmHWM:") - before < n_bytes


@pytest.mark.parametrize("name", STOPPED)
def test_a_template_that_wants_too_much_is_stopped(name: str) -> None:
    template = ChatTemplate(STOPPED[name], clock=itertools.count(step=0.01).__next__)
    with (
        takes_at_most(_N_BYTES_PEAK_MAX),
        pytest.raises(InvalidArgument, match=r"was stopped: it .*set session\.chat_te"),
    ):
        template.render(HELLO)


@pytest.mark.parametrize(
    "source",
    [
        "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
        "{% for a in [1] recursive %}{{ loop([1]) }}{% endfor %}",
        "{% for i in range(10 ** 9) %}{% endfor %}",
        "{{ '%1000000000d' % 1 }}",
        "{{ '{:1000000000}'.format(1) }}",
        "{{ '{0:{1}}'.format(1, 10 ** 9) }}",
        "{{ 'a'.ljust(10 ** 9) }}",
        "{{ lipsum(n=10 ** 9) }}",
        "{{ [1] | map(' list') | list }}",
        "{{ 'a'.encode() }}",
        "{{ [].append.__self__ }}",
        "{{ dict.fromkeys([1]) }}",
        "{{ messages[0].items | length }}",
    ],
)
def test_what_templates_may_not_do_is_an_error(source: str) -> None:
    with pytest.raises(InvalidArgument, match="the chat template failed: "):
        ChatTemplate(source).render(HELLO)


@pytest.mark.parametrize(
    "source",
    ["{{ 'a' | center(9) }}", "{{ [1] | batch(9) }}", "{% autoescape true %}{% endautoescape %}", "{{ a }}" * 20_000],
    ids=lambda source: source[:20],
)
def test_what_templates_may_not_use_does_not_compile(source: str) -> None:
    with pytest.raises(InvalidArgument, match=r"the chat template .*set session\.chat_template"):
        ChatTemplate(source)


def test_a_long_conversation_is_within_the_limits() -> None:
    """Copied at each message, as templates do that sort messages out before they write them."""
    source = (
        "{% set ns = namespace(kept=[]) %}{% for m in messages %}{% set ns.kept = ns.kept + [m] %}{% endfor %}"
        "{% for m in ns.kept %}{% set content = m.content | trim %}{% if loop.index0 % 2 == 0 %}"
        "{{ '<|' ~ m.role ~ '|>' + content + '\n' }}{% else %}{{ content.split('</think>')[-1] }}{% endif %}"
        "{% endfor %}"
    )
    roles = ("user", "assistant")
    messages = [Message(roles[n % 2], f"{n} " + "word " * 200) for n in range(600)]
    assert len(ChatTemplate(source, clock=lambda: 0.0).render(messages)) > 600 * 1000


def test_a_long_message_is_within_the_limits() -> None:
    message = Message("user", "<é> & 'x' " * 400_000)
    rendered = ChatTemplate("{{ messages[0].content | trim | tojson }}", clock=lambda: 0.0).render([message])
    assert len(rendered) > len(message.content)


def test_a_refusal_is_told_in_few_words() -> None:
    with pytest.raises(InvalidArgument) as refusal:
        ChatTemplate("{{ raise_exception('x' * 1000000) }}").render(HELLO)
    assert len(str(refusal.value)) < 1000


def test_nobody_pays_for_the_rendering_before() -> None:
    template = ChatTemplate("{{ 'x' * 1000000 }}", clock=lambda: 0.0)
    assert {len(template.render(HELLO)) for _ in range(10)} == {1_000_000}
