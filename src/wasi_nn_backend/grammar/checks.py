"""What is found out about a grammar's rules before a text is followed through them."""

from __future__ import annotations

from collections.abc import Iterator

from wasi_nn_backend.grammar.gbnf import Element, Grammar, complain

__all__ = ["check_rules", "nesting_rules"]


def check_rules(grammar: Grammar) -> None:
    """Raises ``InvalidArgument`` for left recursion, which no search from left to right comes back from."""
    empty = _rules_that_can_be_empty(grammar)
    leftmost = [list(dict.fromkeys(_first_references(rule.alternatives, empty))) for rule in grammar.rules]
    number = _own_descendant(leftmost)
    if number is not None:
        rule = grammar.rules[number]
        complain(
            grammar.text,
            rule.position,
            f"the rule {rule.name!r} can begin with itself (left recursion); put something in front of the recursion",
        )


def nesting_rules(grammar: Grammar) -> list[int]:
    """The rules through which texts nest: they lead back to themselves with something left to come afterwards.

    Only their number of readings of one text can grow without bound. One of each group that refer to each other.
    """
    component = _components([sorted(set(_references(rule.alternatives))) for rule in grammar.rules])
    nesting: dict[int, int] = {}
    for number, rule in enumerate(grammar.rules):
        for alternative in rule.alternatives:
            inner = alternative[:-1]
            if any(isinstance(item, int) and component[item] == component[number] for item in inner):
                nesting.setdefault(component[number], number)
    return sorted(nesting.values())


def _references(alternatives: list[list[Element]]) -> Iterator[int]:
    return (element for alternative in alternatives for element in alternative if isinstance(element, int))


def _rules_that_can_be_empty(grammar: Grammar) -> set[int]:
    users: dict[int, list[int]] = {}
    for number, rule in enumerate(grammar.rules):
        for child in _references(rule.alternatives):
            users.setdefault(child, []).append(number)
    empty: set[int] = set()
    open_rules = list(range(len(grammar.rules)))
    while open_rules:
        number = open_rules.pop()
        alternatives = grammar.rules[number].alternatives
        if number not in empty and any(_is_empty(alternative, empty) for alternative in alternatives):
            empty.add(number)
            open_rules.extend(users.get(number, ()))
    return empty


def _is_empty(alternative: list[Element], empty: set[int]) -> bool:
    return all(isinstance(element, int) and element in empty for element in alternative)


def _first_references(alternatives: list[list[Element]], empty: set[int]) -> Iterator[int]:
    """The rules that an alternative can begin with, once for every place where they stand."""
    for alternative in alternatives:
        for element in alternative:
            if not isinstance(element, int):
                break
            yield element
            if element not in empty:
                break


def _own_descendant(children: list[list[int]]) -> int | None:
    """A number that is a child of a child, and so on, of itself."""
    state = [0] * len(children)  # 0 unseen, 1 under way, 2 done
    for start in range(len(children)):
        path = [(start, iter(children[start]))] if not state[start] else []
        state[start] = state[start] or 1
        while path:
            number, rest = path[-1]
            child = next(rest, None)
            if child is None:
                state[number] = 2
                path.pop()
            elif state[child] == 1:
                return child
            elif state[child] == 0:
                state[child] = 1
                path.append((child, iter(children[child])))
    return None


def _components(children: list[list[int]]) -> list[int]:
    """Strongly connected components (Tarjan, without recursion): one number for each group of mutual descendants."""
    index: dict[int, int] = {}
    low: dict[int, int] = {}
    component = [-1] * len(children)
    waiting: list[int] = []
    for start in range(len(children)):
        path = [(start, iter(children[start]))] if start not in index else []
        while path:
            number, rest = path[-1]
            if number not in index:
                index[number] = low[number] = len(index)
                waiting.append(number)
            child = next(rest, None)
            if child is None:
                path.pop()
                if path:
                    parent = path[-1][0]
                    low[parent] = min(low[parent], low[number])
                if low[number] == index[number]:
                    while component[number] < 0:
                        component[waiting.pop()] = number
            elif child not in index:
                path.append((child, iter(children[child])))
            elif component[child] < 0:
                low[number] = min(low[number], index[child])
    return component
