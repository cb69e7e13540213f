"""Chat templates rewritten so that they pay for what they do, before Jinja compiles them.

Jinja's sandbox intercepts calls and arithmetic, which ``template_environment`` uses. What it does not intercept is
wrapped here, in the syntax tree, in filters whose names no template can write.
"""

from __future__ import annotations

from typing import Any, Final

from jinja2 import nodes, pass_context
from jinja2.exceptions import TemplateSyntaxError
from jinja2.runtime import Context
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

from wasi_nn_backend.session.template_budget import TemplateBudget, TemplateLimitError

__all__ = ["BUDGET", "GUARDS", "budget_of", "guarded"]

#: The variable that holds the rendering's budget. A template cannot write a name with a blank, here and below.
BUDGET: Final = " budget"

_PAID: Final = " paid"
_COMPOSED: Final = " composed"
_CONCATENATED: Final = " concatenated"
_ATTRIBUTE: Final = " attribute"


def budget_of(context: Context) -> TemplateBudget:
    budget = context.resolve(BUDGET)
    if not isinstance(budget, TemplateBudget):
        raise TypeError("a template was rendered without a budget")  # a fault of ours
    return budget


def guarded(tree: nodes.Template) -> nodes.Template:
    """The tree with guards in it. Raises ``TemplateSyntaxError`` for what templates may not use."""
    _Guard().visit(tree)
    return tree


def _wrapped(name: str, node: nodes.Node) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


class _Guard(NodeTransformer):
    """Loops, outputs, and every kind of expression that makes a value out of others."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        step = _wrapped(_PAID, nodes.Const(True, lineno=node.lineno))
        node.body.insert(0, nodes.ExprStmt(step, lineno=node.lineno))
        if node.test is not None:  # a loop that leaves everything out never reaches its body
            node.test = nodes.And(_wrapped(_PAID, nodes.Const(True, lineno=node.lineno)), node.test)
        return node

    def visit_Output(self, node: nodes.Output) -> nodes.Node:
        self.generic_visit(node)
        node.nodes = [_wrapped(_PAID, child) for child in node.nodes]
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _wrapped(_CONCATENATED, nodes.List(node.nodes, lineno=node.lineno))

    def visit_List(self, node: nodes.List) -> nodes.Node:
        return _wrapped(_COMPOSED, self._with_guarded_children(node))

    def visit_Dict(self, node: nodes.Dict) -> nodes.Node:
        return _wrapped(_COMPOSED, self._with_guarded_children(node))

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Node:
        self.generic_visit(node)
        return node if node.ctx == "store" else _wrapped(_COMPOSED, node)

    def visit_Name(self, node: nodes.Name) -> nodes.Node:
        """What a macro got beyond its parameters is a container that Jinja makes."""
        is_made = node.ctx == "load" and node.name in ("varargs", "kwargs")
        return _wrapped(_COMPOSED, node) if is_made else node

    def visit_Filter(self, node: nodes.Filter) -> nodes.Node:
        return _wrapped(_PAID, self._with_guarded_children(node))

    def visit_Test(self, node: nodes.Test) -> nodes.Node:
        return _wrapped(_PAID, self._with_guarded_children(node))

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:
        return _wrapped(_PAID, self._with_guarded_children(node))

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        self.generic_visit(node)
        return _wrapped(_PAID, node) if isinstance(node.arg, nodes.Slice) else node

    def visit_Assign(self, node: nodes.Assign) -> nodes.Node:
        self.generic_visit(node)
        if isinstance(node.target, nodes.NSRef):
            node.node = _wrapped(_ATTRIBUTE, node.node)
        return node

    def visit_FilterBlock(self, node: nodes.FilterBlock) -> nodes.Node:
        return self._with_bare_filter(node)

    def visit_AssignBlock(self, node: nodes.AssignBlock) -> nodes.Node:
        return self._with_bare_filter(node)

    def visit_ScopedEvalContextModifier(self, node: nodes.ScopedEvalContextModifier) -> nodes.Node:
        raise TemplateSyntaxError("autoescape blocks are for HTML, not for prompts", node.lineno)

    def _with_guarded_children(self, node: nodes.Expr) -> nodes.Expr:
        self.generic_visit(node)
        return node

    def _with_bare_filter(self, node: Any) -> nodes.Node:
        """Jinja wants the filter itself here, and writes what comes out of it: an output within, which has paid."""
        self.generic_visit(node)
        if node.filter is not None:
            node.filter = node.filter.node
        result: nodes.Node = node
        return result


@pass_context
def _paid(context: Context, value: Any) -> Any:
    budget_of(context).pay_for(value)
    return value


@pass_context
def _composed(context: Context, value: Any) -> Any:
    budget_of(context).pay_for_composed(value)
    return value


@pass_context
def _concatenated(context: Context, values: list[Any]) -> str:
    texts = [str(value) for value in values]
    budget_of(context).spend(sum(map(len, texts)))
    return "".join(texts)


@pass_context
def _attribute(_context: Context, value: Any) -> Any:
    if isinstance(value, Namespace):
        raise TemplateLimitError("it puts a namespace inside of another value")
    return value


GUARDS: Final = {_PAID: _paid, _COMPOSED: _composed, _CONCATENATED: _concatenated, _ATTRIBUTE: _attribute}
