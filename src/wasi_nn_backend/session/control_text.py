"""What users write cannot be a control token.

A prompt's control tokens come from the chat template, and the whole rendered text is tokenised with them: a message
that spells one, say the end of its own turn, would otherwise begin a turn in somebody else's name. Such a spelling is
cut in two, and the halves are tokenised apart. Everything else about the prompt stays as it is.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from wasi_nn_backend.llama.interface import Vocabulary

__all__ = ["ControlTexts", "tokenize_in_parts"]

#: Marks the cut from the message through the template to the tokens. Unicode keeps this character out of all texts.
_CUT = "\ufdd0"


class ControlTexts:
    """The spellings of a vocabulary's control tokens."""

    def __init__(self, texts: Iterable[str]) -> None:
        self._texts = {text for text in texts if len(text) > 1}  # one character has no two halves
        self._lengths: dict[str, list[int]] = {}  # by the first character
        for length, first in sorted({(len(text), text[0]) for text in self._texts}):
            self._lengths.setdefault(first, []).append(length)
        self._first = re.compile("|".join(map(re.escape, self._lengths)) or r"(?!)")

    def cut(self, content: str) -> str:
        """The text with a mark inside of each spelling, also of those that overlap."""
        content = content.replace(_CUT, "\N{REPLACEMENT CHARACTER}")
        pieces, n_done = [], 0
        for match in self._first.finditer(content):
            start = match.start()
            if any(content[start : start + length] in self._texts for length in self._lengths[match[0]]):
                pieces.append(content[n_done : start + 1])
                n_done = start + 1
        return _CUT.join((*pieces, content[n_done:]))


def tokenize_in_parts(text: str, vocabulary: Vocabulary, *, add_special: bool) -> list[int]:
    """Tokens of a rendered prompt, control tokens included, cut where ``ControlTexts.cut`` said."""
    tokens: list[int] = []
    for index, part in enumerate(text.split(_CUT)):
        # A template can write half a surrogate pair, which has no UTF-8.
        data = part.encode(errors="replace")
        tokens += vocabulary.tokenize(data, add_special=add_special and index == 0, parse_special=True)
    return tokens
