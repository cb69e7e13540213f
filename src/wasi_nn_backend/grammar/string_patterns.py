"""JSON strings that match a regular expression, in GBNF."""

from __future__ import annotations

from typing import Any

from wasi_nn_backend.errors import InvalidArgument
from wasi_nn_backend.grammar.characters import Characters
from wasi_nn_backend.grammar.json_rules import RuleBook
from wasi_nn_backend.grammar.regex import Anchor, Choice, Group, Node, Repeat, Sequence, read_regex
from wasi_nn_backend.grammar.schema_parts import complain

__all__ = ["pattern_rule"]


def pattern_rule(book: RuleBook, pattern: Any, at_least: int, at_most: int | None, path: str) -> str:
    """A string with a match of ``pattern`` in it, ``at_least`` to ``at_most`` characters long.

    Raises ``InvalidArgument`` for a pattern that is wrong, and for lengths that it does not keep by itself.
    """
    if not isinstance(pattern, str):
        complain(f"{path}/pattern", "this is a regular expression in a string")
    try:
        node = read_regex(pattern)
    except InvalidArgument as error:
        complain(f"{path}/pattern", str(error))
    options = []
    for option in _options(node):
        items, starts, ends = _without_anchors(option, path)
        least, most = _lengths(Sequence(items))
        if not (starts and ends):
            most = None
        if least < at_least or (at_most is not None and (most is None or most > at_most)):
            complain(
                f"{path}/pattern", "the pattern allows other lengths than minLength and maxLength; write them into it"
            )
        before, after = "" if starts else f"{book.standard('char')}*", "" if ends else f"{book.standard('char')}*"
        options.append(" ".join(part for part in (before, _written(book, Sequence(items), path), after) if part))
    return f'"\\"" {book.add("pattern", " | ".join(options))} "\\""'


def _options(node: Node) -> list[Node]:
    """The alternatives of the whole expression, seen through parentheses around all of it."""
    while isinstance(node, Group):
        node = node.item
    return [inner for option in node.options for inner in _options(option)] if isinstance(node, Choice) else [node]


def _without_anchors(option: Node, path: str) -> tuple[tuple[Node, ...], bool, bool]:
    """The items between the anchors, and whether there are anchors at the start and at the end."""
    items = option.items if isinstance(option, Sequence) else (option,)
    starts, ends = False, False
    while items and items[0] == Anchor(is_end=False):
        items, starts = items[1:], True
    while items and items[-1] == Anchor(is_end=True):
        items, ends = items[:-1], True
    if _has_anchor(Sequence(items)):
        complain(f"{path}/pattern", "^ and $ can only stand at the ends of the pattern")
    return items, starts, ends


def _has_anchor(node: Node) -> bool:
    match node:
        case Anchor():
            return True
        case Sequence(items) | Choice(items):
            return any(_has_anchor(item) for item in items)
        case Group(item) | Repeat(item):
            return _has_anchor(item)
        case _:
            return False


def _lengths(node: Node) -> tuple[int, int | None]:
    """The least and the largest number of characters that match; None is without end."""
    match node:
        case Sequence(items):
            each = [_lengths(item) for item in items]
            return sum(low for low, _ in each), _sum_or_none([high for _, high in each])
        case Choice(options):
            each = [_lengths(option) for option in options]
            highs = [high for _, high in each]
            return min(low for low, _ in each), None if None in highs else max(high or 0 for high in highs)
        case Group(item):
            return _lengths(item)
        case Repeat(item, at_least, at_most):
            low, high = _lengths(item)
            endless = high is None or (at_most is None and high > 0)
            return low * at_least, None if endless or high is None else high * (at_most or 0)
        case _:
            return 1, 1


def _sum_or_none(lengths: list[int | None]) -> int | None:
    total = 0
    for length in lengths:
        if length is None:
            return None
        total += length
    return total


def _written(book: RuleBook, node: Node, path: str) -> str:
    match node:
        case Characters():
            written = book.json_character(node)
            if not written:
                complain(f"{path}/pattern", "it asks for a character that no JSON string can hold")
            return written
        case Sequence(items):
            return " ".join(_written(book, item, path) for item in items)
        case Choice(options):
            return f"( {' | '.join(_written(book, option, path) for option in options)} )"
        case Group(item):
            return f"( {_written(book, item, path)} )"
        case Repeat(item, at_least, at_most):
            if at_most is None and _lengths(item)[0] == 0:
                complain(f"{path}/pattern", "it repeats without end what can be empty; write + for the inner *")
            return book.repeated(book.add("repeated", _written(book, item, path)), at_least, at_most)
        case Anchor():
            complain(f"{path}/pattern", "^ and $ can only stand at the ends of the pattern")
