"""Jinja for chat templates: what they may call, and what it costs them.

Templates come out of model files, which are untrusted input. Jinja's sandbox keeps them from changing what they are
given and from names that begin with an underscore; here they may call only what is listed, since what is not listed
need not be thought about.
"""

from __future__ import annotations

import datetime
import types
from collections.abc import Mapping
from string import Formatter
from typing import Any, Final, NoReturn

from jinja2 import Environment, Template, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.runtime import Context, LoopContext, Macro, Undefined
from jinja2.sandbox import ImmutableSandboxedEnvironment, safe_range
from jinja2.utils import Joiner, Namespace

from wasi_nn_backend.session.template_budget import N_UNITS_PER_ELEMENT
from wasi_nn_backend.session.template_filters import make_filters
from wasi_nn_backend.session.template_guard import budget_of, guarded

__all__ = ["TemplateEnvironment", "TemplateRefusal"]

_N_REFUSAL_CHARS_MAX: Final = 500
_N_DATE_CHARS_MAX: Final = 200


def _names(*lines: str) -> frozenset[str]:
    return frozenset(name for line in lines for name in line.split())


_METHODS: Final[Mapping[type, frozenset[str]]] = {
    str: _names(
        "capitalize casefold count endswith find index isalnum isalpha isascii isdecimal isdigit islower isnumeric",
        "isspace istitle isupper join lower lstrip partition removeprefix removesuffix replace rfind rindex rpartition",
        "rsplit rstrip split splitlines startswith strip swapcase title upper",
    ),
    dict: _names("copy get items keys values"),
    list: _names("copy count index"),
    tuple: _names("count index"),
}
_LOOP_METHODS: Final = _names("cycle changed")


class TemplateRefusal(Exception):
    """Raised by ``raise_exception`` inside a template: its own words for messages it does not take."""


class TemplateEnvironment(ImmutableSandboxedEnvironment):
    """The options and extensions under which templates are written, those of transformers, within limits."""

    intercepted_binops = frozenset(("+", "-", "*", "/", "//", "**", "%"))

    def __init__(self) -> None:
        # Not optimised: Jinja would compute constant expressions while it compiles, when there is no budget.
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            optimized=False,
            cache_size=0,
            extensions=["jinja2.ext.loopcontrols", _GenerationBlock],
        )
        self.globals.clear()
        self.globals.update(_GLOBALS)
        self.filters = make_filters()

    def from_source(self, source: str) -> Template:
        return self.from_string(guarded(self.parse(source)))

    def getattr(self, obj: Any, attribute: str) -> Any:
        self._refuse_private(obj, attribute)
        return super().getattr(obj, attribute)

    def getitem(self, obj: Any, argument: Any) -> Any:
        self._refuse_private(obj, argument)
        return super().getitem(obj, argument)

    def _refuse_private(self, obj: Any, name: Any) -> None:
        """Jinja looks at the value first, and lets what leads to ``str.format`` pass under any name."""
        if isinstance(name, str) and name.startswith("_") and not (isinstance(obj, Mapping) and name in obj):
            self.unsafe_undefined(obj, name)

    def unsafe_undefined(self, obj: Any, attribute: str) -> NoReturn:
        """An error: Jinja lets reaching for Python's internals pass as an empty text."""
        raise SecurityError(f"{attribute!r} of a {type(obj).__name__} is not for templates")

    def call(self, context: Context, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        budget = budget_of(context)
        budget.spend()
        if not _may_be_called(obj) and not isinstance(obj, Undefined):  # which says itself that it is undefined
            raise SecurityError(f"calling {_name_of(obj)} is not for templates")
        if obj is Namespace:
            # Names that begin with an underscore are Jinja's own: it passes its loops' variables that way.
            budget.pay_for_composed([*args, *(kwargs[name] for name in kwargs if not name.startswith("_"))])
        if isinstance(obj, types.BuiltinMethodType) and isinstance(obj.__self__, str):
            args = _prepaid(context, obj.__self__, obj.__name__, args)
        elif (format_method := _format_method(obj)) is not None:
            _pay_for_format(context, format_method.__self__, [*args, *kwargs.values()])
        value = super().call(context, obj, *args, **kwargs)
        budget.pay_for_composed(value)
        return value

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        budget = budget_of(context)
        if operator == "*":
            budget.spend(_n_units_of_product(left, right) or _n_units_of_product(right, left))
        elif operator == "+":
            budget.spend(_n_units(left) + _n_units(right))
        elif operator == "**" and isinstance(left, int) and isinstance(right, int):
            budget.spend(left.bit_length() * max(right, 0))
        elif operator == "%" and isinstance(left, str):
            raise SecurityError("formatting with % is not for templates; use ~")
        value = super().call_binop(context, operator, left, right)
        budget.pay_for_composed(value)
        return value


class _GenerationBlock(Extension):
    """``{% generation %}`` marks the assistant's words for training. Here they are words like any others."""

    def __init__(self, environment: Environment) -> None:
        super().__init__(environment)
        self.tags = {"generation"}

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _may_be_called(obj: Any) -> bool:
    if isinstance(obj, types.BuiltinMethodType):
        return obj.__name__ in _METHODS.get(type(obj.__self__), ())
    if isinstance(obj, types.MethodType):
        return isinstance(obj.__self__, LoopContext) and obj.__name__ in _LOOP_METHODS
    if isinstance(obj, Macro | LoopContext | Joiner) or _format_method(obj) is not None:
        return True
    return any(obj is known for known in _GLOBALS.values())


def _format_method(obj: Any) -> Any:
    """``str.format`` of a text, out of the function in which Jinja's sandbox wraps it."""
    method = getattr(obj, "__wrapped__", None) if isinstance(obj, types.FunctionType) else None
    return method if isinstance(method, types.BuiltinMethodType) and method.__name__ == "format" else None


def _name_of(obj: Any) -> str:
    name = getattr(obj, "__name__", None)
    return name if isinstance(name, str) else f"a {type(obj).__name__}"


def _prepaid(context: Context, text: str, method: str, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Pay for what a method of a text is about to make. The arguments, since a generator can be read only once."""
    budget = budget_of(context)
    match method, args:
        case "replace", (str(old), str(new), *_):
            budget.spend(len(text) + text.count(old) * len(new))
        case "join", (elements, *_):
            texts = list(elements)
            budget.spend(sum(len(text) + len(element) for element in texts if isinstance(element, str)))
            return (texts,)
        case "split" | "rsplit", (str(separator), *_) if separator:
            budget.spend(text.count(separator) * N_UNITS_PER_ELEMENT)
        case "split" | "rsplit" | "splitlines", _:
            budget.spend(len(text) * N_UNITS_PER_ELEMENT // 2)
    return args


def _pay_for_format(context: Context, text: str, values: list[Any]) -> None:
    """Plain fields only: a width of a billion would be made before anybody could pay for it."""
    fields = [(name, spec, conversion) for _, name, spec, conversion in Formatter().parse(text) if name is not None]
    if any(spec or conversion or not (name.isalnum() or not name) for name, spec, conversion in fields):
        raise SecurityError("formatting with anything but plain fields is not for templates; use ~")
    longest = max((len(str(value)) for value in values), default=0)
    budget_of(context).spend(len(text) + len(fields) * longest)


def _n_units(value: Any) -> int:
    if isinstance(value, str):
        return len(value)
    return len(value) * N_UNITS_PER_ELEMENT if isinstance(value, list | tuple) else 0


def _n_units_of_product(value: Any, n: Any) -> int:
    if not isinstance(n, int):
        return 0
    if isinstance(value, int):
        return value.bit_length() + n.bit_length()
    return _n_units(value) * max(n, 0)


def _refuse(message: Any) -> NoReturn:
    raise TemplateRefusal(str(message)[:_N_REFUSAL_CHARS_MAX])


def _strftime_now(pattern: str) -> str:
    return datetime.datetime.now().strftime(pattern[:_N_DATE_CHARS_MAX])


_GLOBALS: Final[Mapping[str, Any]] = {
    "dict": dict,
    "joiner": Joiner,
    "namespace": Namespace,
    "raise_exception": _refuse,
    "range": safe_range,
    "strftime_now": _strftime_now,
}
