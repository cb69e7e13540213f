"""Going on with saved sessions in a process that knows nothing but the files."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wasi_nn_backend import ExecutionContext

_PROGRAM = """
import json, sys
from wasi_nn_backend import Backend

config, prompt, *paths = sys.argv[1:]
with Backend(json.loads(config)) as backend:
    for path in paths:
        context = backend.restore(path)
        messages = [[message.role, message.content] for message in context.messages]
        text = context.run_inference(prompt)
        print(json.dumps([messages, text, context.metadata["input_tokens"], context.metadata["reused_tokens"]]))
"""


@dataclass(frozen=True)
class Continuation:
    """The conversation before, and what came of one more prompt."""

    messages: list[list[str]]
    text: str
    n_tokens_input: int
    n_tokens_reused: int


def continue_here(context: ExecutionContext, prompt: str) -> Continuation:
    messages = [[message.role, message.content] for message in context.messages]
    text = context.run_inference(prompt)
    return Continuation(messages, text, context.metadata["input_tokens"], context.metadata["reused_tokens"])


def continue_in_a_new_process(config: Mapping[str, Any], paths: Sequence[Path], prompt: str) -> list[Continuation]:
    """The same of each saved session, one after the other."""
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM, json.dumps(config), prompt, *map(str, paths)],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    return [Continuation(*json.loads(line)) for line in done.stdout.splitlines()]
