"""What one rendering of a chat template may cost: text, list elements, steps and processor time.

Python cannot interrupt a single operation, so values are kept so small that none takes long: whatever a template
makes is paid for, by its size, from a sum that grows with the conversation. A limit on time alone would come too late
for ``'x' * 10 ** 10``; a separate process with limits of the system would cost more than most renderings.
"""

from __future__ import annotations

from collections.abc import Callable, ItemsView, Iterator, KeysView, Mapping, ValuesView
from typing import Any, Final

from jinja2.utils import Namespace

__all__ = ["N_UNITS_PER_ELEMENT", "N_UNITS_PER_STEP", "TemplateBudget", "TemplateLimitError"]

#: A character costs one unit. An element of a list takes more memory, an operation more time than a character.
N_UNITS_PER_ELEMENT: Final = 16
N_UNITS_PER_STEP: Final = 4

#: What a template has for a conversation without text: about two million steps, some seconds at the very most.
_N_UNITS_BASE: Final = 8 << 20
#: Templates handle each message's text a few times; those that copy all messages at each message need the second.
_N_UNITS_PER_CHARACTER: Final = 64
_N_UNITS_PER_MESSAGE: Final = 16 << 10

_DURATION_MAX_S: Final = 2.0
#: Reading the clock costs as much as a step, so only some of them do it.
_N_STEPS_PER_CLOCK: Final = 16

#: Numbers are for counting: arithmetic with millions of digits would take minutes.
_N_BITS_MAX: Final = 1 << 14


class TemplateLimitError(Exception):
    """A template wants more than it may have. Not a ``ValueError`` or the like, which filters of Jinja catch."""


class TemplateBudget:
    """One rendering's account. ``clock`` gives seconds of this thread's processor time."""

    def __init__(self, n_characters: int, n_messages: int, clock: Callable[[], float]) -> None:
        n_units_for_messages = n_characters * _N_UNITS_PER_CHARACTER + n_messages * _N_UNITS_PER_MESSAGE
        self._n_units_left = _N_UNITS_BASE + n_units_for_messages
        self._n_units_value_max = self._n_units_left // 8
        self._n_steps = 0
        self._clock = clock
        self._deadline_s = clock() + _DURATION_MAX_S

    def spend(self, n_units: int = 0) -> None:
        """Pay for a step, and for ``n_units`` on top of it. Raises ``TemplateLimitError`` when nothing is left."""
        self._n_units_left -= N_UNITS_PER_STEP + n_units
        if self._n_units_left < 0:
            raise TemplateLimitError("it makes too much text or takes too many steps")
        self._n_steps += 1
        if self._n_steps % _N_STEPS_PER_CLOCK == 0 and self._clock() > self._deadline_s:
            raise TemplateLimitError(f"it takes longer than {_DURATION_MAX_S:g} s")

    def pay_for(self, value: Any) -> None:
        """Pay for a value that an operation made, not for what lies deeper inside of it."""
        if isinstance(value, str):
            self.spend(len(value))
        elif isinstance(value, _CONTAINERS):
            self.spend(len(value) * N_UNITS_PER_ELEMENT)
        else:
            self.spend()
            if isinstance(value, int) and value.bit_length() > _N_BITS_MAX:
                raise TemplateLimitError(f"it makes a number of more than {_N_BITS_MAX} bits")

    def pay_for_composed(self, value: Any) -> None:
        """``pay_for``, and refuse a value that would be too large to print: lists that hold the same list twice double
        in each step, at no cost of memory until somebody looks at them."""
        self.pay_for(value)
        if not isinstance(value, _CONTAINERS):
            return
        n_units = 0
        waiting = [value]
        while waiting:
            for element in _elements(waiting.pop()):
                n_units += N_UNITS_PER_ELEMENT
                if isinstance(element, str):
                    n_units += len(element)
                elif isinstance(element, _CONTAINERS):
                    waiting.append(element)
                elif isinstance(element, Namespace):
                    # The only values that change: inside of others, their growth could no longer be seen.
                    raise TemplateLimitError("it puts a namespace inside of another value")
                if n_units > self._n_units_value_max:
                    raise TemplateLimitError("it makes a value that is too large")


_CONTAINERS: Final = (list, tuple, dict, KeysView, ValuesView, ItemsView)


def _elements(value: Any) -> Iterator[Any]:
    if isinstance(value, Mapping):
        yield from value.keys()
        yield from value.values()
    else:
        yield from value
