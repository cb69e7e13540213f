"""Chat with a language model from a Python component, in three lines:

from nn_chat import Chat
chat = Chat("default")
print(chat.ask("What is the capital of France?"))
"""

from __future__ import annotations

import json
from typing import Any

from componentize_py_types import Err
from wit_world.imports.graph import load_by_name
from wit_world.imports.tensor import Tensor, TensorType

__all__ = ["Chat", "ChatError"]


class ChatError(Exception):
    """A call that the host could not answer. ``code`` is one of the WIT's, such as ``NOT_FOUND``."""

    def __init__(self, code: str, text: str) -> None:
        super().__init__(f"{code}: {text}")
        self.code = code


class Chat:
    """One conversation; the host remembers what was said.

    ``graph`` is the name that the host gave the model. Settings are the host's configuration keys, such as
    ``temperature=0`` or ``max_tokens=64``. Everything raises ``ChatError``.
    """

    def __init__(self, graph: str, **settings: Any) -> None:
        self.metadata: dict[str, Any] = {}
        self._settings: dict[str, Any] | None = {"prompt_mode": "chat", **settings}
        try:
            # The host keeps the model for as long as there is a context, so the graph need not be kept here.
            self._context = load_by_name(graph).init_execution_context()
        except Err as failure:
            raise _error(failure) from None

    def ask(self, question: str) -> str:
        """The answer to one more message. ``metadata`` then has its figures."""
        inputs = [("prompt", _tensor(question))]
        if self._settings is not None:
            inputs.append(("config", _tensor(json.dumps(self._settings))))
        try:
            outputs = dict(self._context.compute(inputs))
        except Err as failure:
            raise _error(failure) from None
        self._settings = None
        self.metadata = json.loads(outputs["metadata"].data())
        # A text that ends at its token limit may end inside a character.
        return outputs["output"].data().decode(errors="replace")


def _tensor(text: str) -> Tensor:
    data = text.encode()
    return Tensor([len(data)], TensorType.U8, data)


def _error(failure: Err[Any]) -> ChatError:
    return ChatError(failure.value.code().name, failure.value.data())
