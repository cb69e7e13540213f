"""The chat templates of one graph's model, compiled once for all of its sessions."""

from __future__ import annotations

import logging
import threading

from wasi_nn_backend.llama.interface import Model, Vocabulary
from wasi_nn_backend.session.builtin_templates import builtin_named, builtin_suited_to
from wasi_nn_backend.session.chat import ChatTemplate
from wasi_nn_backend.session.control_text import ControlTexts

__all__ = ["ChatTemplates"]

_log = logging.getLogger(__name__)

#: Whoever sets another template for every session would otherwise fill the memory.
_N_TEMPLATES_MAX = 8


class ChatTemplates:
    """Any thread may ask. What was compiled for another model, before the graph got this one, is forgotten."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._model: Model | None = None
        self._compiled: dict[str, ChatTemplate] = {}
        self._control_texts: ControlTexts | None = None

    def get(self, model: Model, chosen: str | None) -> ChatTemplate:
        """``chosen`` is a template's text or the name of a built-in one, None or empty for the model's own.

        A model without a template gets a built-in one that suits its vocabulary. Raises ``InvalidArgument`` for a text
        that does not compile, or a name that there is not.
        """
        source = chosen or model.chat_template or ""
        with self._lock:
            self._turn_to(model)
            template = self._compiled.get(source)
            if template is None:
                template = _compiled(source, model.vocabulary)
                if len(self._compiled) >= _N_TEMPLATES_MAX:
                    del self._compiled[next(iter(self._compiled))]
                self._compiled[source] = template
        return template

    def control_texts(self, model: Model) -> ControlTexts:
        with self._lock:
            self._turn_to(model)
            if self._control_texts is None:
                self._control_texts = ControlTexts(model.vocabulary.control_texts)
            return self._control_texts

    def _turn_to(self, model: Model) -> None:
        if self._model is not model:
            self._model, self._control_texts = model, None
            self._compiled.clear()


def _compiled(source: str, vocabulary: Vocabulary) -> ChatTemplate:
    stops: tuple[bytes, ...] = ()
    if not source:
        source = builtin_suited_to(vocabulary)
        _log.info("the model has no chat template: using %s", source)
    if "{" not in source:  # what has no place for messages is no template
        builtin = builtin_named(source)
        source, stops = builtin.source, builtin.stops_for(vocabulary)
    return ChatTemplate(source, bos_text=vocabulary.bos_text, eos_text=vocabulary.eos_text, stops=stops)
