"""The filters of chat templates: Jinja's, without those that only web pages want, and paid for before they work."""

from __future__ import annotations

import html
import json
from collections.abc import Callable, Iterator
from typing import Any, Final

from jinja2 import pass_context
from jinja2.exceptions import SecurityError
from jinja2.filters import FILTERS, do_indent, do_round, make_attrgetter
from jinja2.runtime import Context

from wasi_nn_backend.session.template_budget import N_UNITS_PER_ELEMENT, N_UNITS_PER_STEP, TemplateLimitError
from wasi_nn_backend.session.template_guard import GUARDS, budget_of

__all__ = ["make_filters"]

_N_INDENT_MAX: Final = 64
_N_DIGITS_MAX: Final = 20

#: Filters of Jinja as they are: what they make is not larger than what they get.
_PLAIN_FILTERS: Final = "abs attr capitalize count d default float int length lower reverse string trim truncate upper"
#: Those that go through all elements, or make a list of a text's characters.
_ELEMENT_FILTERS: Final = "dictsort first groupby items last list max min sort sum title unique"
#: Those whose result is computed while somebody goes through it.
_LAZY_FILTERS: Final = "map reject rejectattr select selectattr"


def make_filters() -> dict[str, Callable[..., Any]]:
    return {
        **{name: FILTERS[name] for name in _PLAIN_FILTERS.split()},
        # The originals keep a name of their own, under which Jinja itself passes them what they want to know.
        **{f" {name}": FILTERS[name] for name in f"{_ELEMENT_FILTERS} {_LAZY_FILTERS}".split()},
        **{name: _element_filter(name) for name in _ELEMENT_FILTERS.split()},
        **{name: _lazy_filter(name) for name in _LAZY_FILTERS.split()},
        **GUARDS,
        "e": _escape,
        "escape": _escape,
        "indent": _indent,
        "join": _join,
        "replace": _replace,
        "round": _round,
        "safe": str,
        "tojson": _to_json,
    }


def _pay_for_elements(context: Context, value: Any) -> None:
    if isinstance(value, str):
        budget_of(context).spend(len(value) * N_UNITS_PER_ELEMENT)
    elif hasattr(value, "__len__"):
        budget_of(context).spend(len(value) * N_UNITS_PER_STEP)


def _element_filter(name: str) -> Callable[..., Any]:
    @pass_context
    def filtered(context: Context, value: Any, *args: Any, **kwargs: Any) -> Any:
        _pay_for_elements(context, value)
        if name == "sum" and any(isinstance(argument, list | tuple) for argument in (*args, *kwargs.values())):
            raise TemplateLimitError("it adds up lists with sum; use +")  # each addition copies what there is
        return context.environment.call_filter(f" {name}", value, args, kwargs, context=context)

    return filtered


def _lazy_filter(name: str) -> Callable[..., Any]:
    @pass_context
    def filtered(context: Context, value: Any, *args: Any, **kwargs: Any) -> Iterator[Any]:
        if name == "map" and args and str(args[0]).startswith(" "):
            raise SecurityError(f"the filter {args[0]!r} is not for templates")
        _pay_for_elements(context, value)
        for element in context.environment.call_filter(f" {name}", value, args, kwargs, context=context):
            budget_of(context).pay_for_composed(element)
            yield element

    return filtered


def _escape(value: Any) -> str:
    """As text: Jinja would mark it as HTML, whose operators are others."""
    return html.escape(str(value))


@pass_context
def _indent(context: Context, text: str, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
    n_columns = len(width) if isinstance(width, str) else width
    budget_of(context).spend(n_columns * (text.count("\n") + 2))
    return str(do_indent(text, width, first, blank))


@pass_context
def _join(context: Context, value: Any, separator: Any = "", attribute: str | int | None = None) -> str:
    _pay_for_elements(context, value)
    elements = value if attribute is None else map(make_attrgetter(context.environment, attribute), value)
    between, texts = str(separator), []
    for element in elements:
        texts.append(str(element))
        budget_of(context).spend(len(texts[-1]) + len(between))
    return between.join(texts)


@pass_context
def _replace(context: Context, value: Any, old: Any, new: Any, count: int | None = None) -> str:
    text, old, new = str(value), str(old), str(new)
    budget_of(context).spend(len(text) + text.count(old) * len(new))
    return text.replace(old, new, -1 if count is None else count)


def _round(value: float, precision: int = 0, method: Any = "common") -> float:
    if abs(precision) > _N_DIGITS_MAX:
        raise TemplateLimitError(f"it rounds to more than {_N_DIGITS_MAX} digits")
    return do_round(value, precision, method)


@pass_context
def _to_json(
    context: Context,
    value: Any,
    indent: int | str | None = None,
    *,
    ensure_ascii: bool = False,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own escapes for HTML, which models have never seen."""
    if indent is not None and (len(indent) if isinstance(indent, str) else indent) > _N_INDENT_MAX:
        raise TemplateLimitError(f"it indents JSON by more than {_N_INDENT_MAX} columns")
    encoder = json.JSONEncoder(ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
    parts = []
    for part in encoder.iterencode(value):
        budget_of(context).spend(len(part))
        parts.append(part)
    return "".join(parts)
