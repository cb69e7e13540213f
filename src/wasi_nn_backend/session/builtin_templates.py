"""Chat templates for models that have none, also there by name: ``session.chat_template`` "chatml" and so on.

Each is written here in the style of one family. A model without a template gets the one whose markers its vocabulary
has as tokens of their own, since markers that a model reads as mere letters mean little to it. Where no family fits,
the format is plain text, which every model has seen.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

from wasi_nn_backend.errors import InvalidArgument
from wasi_nn_backend.llama.interface import Vocabulary

__all__ = ["BUILTIN_TEMPLATES", "BuiltinTemplate", "builtin_named", "builtin_suited_to"]


@dataclass(frozen=True, slots=True)
class BuiltinTemplate:
    """``markers`` tell by a vocabulary that a model knows the format. ``stops`` end an answer where they are text: a
    model that has them as tokens ends by itself."""

    source: str
    markers: tuple[str, ...]
    stops: tuple[str, ...]

    def suits(self, vocabulary: Vocabulary) -> bool:
        return bool(self.markers) and all(_is_token(marker, vocabulary) for marker in self.markers)

    def stops_for(self, vocabulary: Vocabulary) -> tuple[bytes, ...]:
        return tuple(stop.encode() for stop in self.stops if not _is_token(stop, vocabulary))


_CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

_GEMMA = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('there is no system role') }}{% endif %}"
    "{% for message in messages %}<start_of_turn>{{ 'model' if message.role == 'assistant' else message.role }}\n"
    "{{ message.content | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)

_LLAMA3 = (
    "{{ bos_token }}{% for message in messages %}<|start_header_id|>{{ message.role }}<|end_header_id|>\n\n"
    "{{ message.content | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)

_PHI3 = (
    "{% for message in messages %}<|{{ message.role }}|>\n{{ message.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)

_ZEPHYR = (
    "{% for message in messages %}<|{{ message.role }}|>\n{{ message.content }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)

_MISTRAL = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('there is no system role') }}{% endif %}"
    "{% for message in messages %}{% if message.role == 'user' %}[INST] {{ message.content }} [/INST]"
    "{% else %} {{ message.content | trim }}{{ eos_token }}{% endif %}{% endfor %}"
)

_PLAIN = (
    "{% for message in messages %}{% if message.role == 'system' %}{{ message.content }}\n\n"
    "{% else %}{{ message.role | capitalize }}: {{ message.content | trim }}\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)

#: In the order in which vocabularies are tried.
BUILTIN_TEMPLATES: Final[Mapping[str, BuiltinTemplate]] = MappingProxyType(
    {
        "chatml": BuiltinTemplate(_CHATML, ("<|im_start|>", "<|im_end|>"), ("<|im_end|>",)),
        "gemma": BuiltinTemplate(_GEMMA, ("<start_of_turn>", "<end_of_turn>"), ("<end_of_turn>",)),
        "llama3": BuiltinTemplate(_LLAMA3, ("<|start_header_id|>", "<|eot_id|>"), ("<|eot_id|>",)),
        "phi3": BuiltinTemplate(_PHI3, ("<|user|>", "<|assistant|>", "<|end|>"), ("<|end|>",)),
        "zephyr": BuiltinTemplate(_ZEPHYR, ("<|user|>", "<|assistant|>"), ("<|user|>",)),
        "mistral": BuiltinTemplate(_MISTRAL, ("[INST]", "[/INST]"), ("[INST]",)),
        "plain": BuiltinTemplate(_PLAIN, (), ("\nUser:",)),
    }
)


def builtin_named(name: str) -> BuiltinTemplate:
    """Raises ``InvalidArgument`` for a name that there is not."""
    template = BUILTIN_TEMPLATES.get(name)
    if template is None:
        raise InvalidArgument(
            f"there is no chat template named {name[:80]!r}; set session.chat_template to one of "
            f"{', '.join(BUILTIN_TEMPLATES)}, or to a Jinja template's text"
        )
    return template


def builtin_suited_to(vocabulary: Vocabulary) -> str:
    """The name of the template for a model that has none."""
    return next((name for name, template in BUILTIN_TEMPLATES.items() if template.suits(vocabulary)), "plain")


def _is_token(text: str, vocabulary: Vocabulary) -> bool:
    return len(vocabulary.tokenize(text.encode(), add_special=False, parse_special=True)) == 1
