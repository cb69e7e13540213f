"""A command that asks a model the questions on its command line, one after the other in one conversation.

Build and run: see README.md.
"""

from __future__ import annotations

import sys

from componentize_py_types import Err
from nn_chat import Chat, ChatError


class Run:
    """What the host starts."""

    def run(self) -> None:
        if len(sys.argv) < 3:
            sys.stderr.write("usage: ask.wasm GRAPH QUESTION...\n")
            raise Err(None)
        try:
            chat = Chat(sys.argv[1], max_tokens=64, temperature=0)
            for question in sys.argv[2:]:
                print(chat.ask(question))
        except ChatError as error:
            sys.stderr.write(f"{error}\n")
            raise Err(None) from None
