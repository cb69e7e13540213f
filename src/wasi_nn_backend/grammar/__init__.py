"""Grammars that hold output to a form: GBNF and JSON schemas, read, checked and followed. Knows no model."""

from __future__ import annotations

from wasi_nn_backend.grammar.follower import GrammarFollower, Step, TokenText
from wasi_nn_backend.grammar.json_schema import json_schema_to_gbnf
from wasi_nn_backend.grammar.matcher import Matcher, Place, check_gbnf
from wasi_nn_backend.grammar.token_table import TokenTable
from wasi_nn_backend.grammar.triggers import check_triggers

__all__ = [
    "GrammarFollower",
    "Matcher",
    "Place",
    "Step",
    "TokenTable",
    "TokenText",
    "check_gbnf",
    "check_triggers",
    "json_schema_to_gbnf",
]
