"""One user's conversation with one model, and how it becomes tokens.

The history is the truth; the KV cache only mirrors it. No engine is needed to read or change a session.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace

from wasi_nn_backend.config import Settings
from wasi_nn_backend.errors import InvalidArgument
from wasi_nn_backend.llama.interface import Model
from wasi_nn_backend.output import opens_reasoning
from wasi_nn_backend.session.chat import Message
from wasi_nn_backend.session.control_text import tokenize_in_parts
from wasi_nn_backend.session.templates import ChatTemplates
from wasi_nn_backend.types import PromptMode

__all__ = ["Prompt", "Session"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Prompt:
    """What one run computes. ``turn`` is the conversation up to it, in chat mode.

    ``stops`` are byte strings that end an answer in the chat's format. ``opens_reasoning``: the prompt ends inside of a
    reasoning block, so the answer begins there.
    """

    tokens: list[int]
    turn: tuple[Message, ...] | None
    stops: tuple[bytes, ...] = ()
    opens_reasoning: bool = False


class Session:
    """Pending input and finished turns. Not thread-safe: its execution context serialises. ``templates`` are those of
    the model, which its sessions share."""

    def __init__(self, session_id: int, default_mode: PromptMode, templates: ChatTemplates | None = None) -> None:
        self.id = session_id
        self._default_mode = default_mode
        self._input: bytes | None = None
        self._messages: tuple[Message, ...] = ()  # before the pending input
        self._n_left_out = 0  # of the first messages, which no longer fit the window
        self._finished: tuple[Message, ...] | None = None  # with the pending input's answer, once there is one
        self._templates = templates or ChatTemplates()
        self._warned_of_tools = False
        self._prompt: tuple[Model, Settings, Prompt] | None = None  # of the pending input, until one of them changes

    @property
    def messages(self) -> tuple[Message, ...]:
        """The turns so far, without the system prompt, which is configuration."""
        return self._messages if self._finished is None else self._finished

    @property
    def has_input(self) -> bool:
        return self._input is not None

    @property
    def pending_input(self) -> bytes | None:
        """A prompt that is set and not answered yet."""
        return self._input if self._finished is None else None

    def set_input(self, prompt: bytes) -> None:
        """Take the next prompt. The last turn, if it was answered, becomes history; an unanswered one is replaced."""
        self._messages = self.messages
        self._finished = None
        self._input = prompt
        self._prompt = None

    def drop_input(self) -> None:
        """Have no pending prompt. The last turn, if it was answered, becomes history."""
        self._messages = self.messages
        self._finished = None
        self._input = None
        self._prompt = None

    def copy(self, session_id: int) -> Session:
        """Another session that goes on from here."""
        other = Session(session_id, self._default_mode, self._templates)
        other._input, other._messages, other._finished = self._input, self._messages, self._finished
        other._n_left_out = self._n_left_out
        return other

    @property
    def n_left_out(self) -> int:
        """How many of the first messages are no longer in the prompts, since they did not fit."""
        return self._n_left_out

    def resume(self, messages: tuple[Message, ...], n_left_out: int) -> None:
        """Go on from turns that were finished elsewhere."""
        self.clear()
        self._messages, self._n_left_out = messages, n_left_out

    def clear(self) -> None:
        """Forget the conversation."""
        self._messages = ()
        self._n_left_out = 0
        self._finished = None
        self._input = None
        self._prompt = None

    def prompt(self, model: Model, settings: Settings, n_tokens_max: int) -> Prompt:
        """Tokens of the pending input. Asking again gives the same: computing twice generates twice.

        A conversation longer than ``n_tokens_max`` loses its oldest turns, as far as ``memory.context_shifting`` is on:
        whole turns, and so many that half of the window is free again, since a cut at each turn would have the rest
        computed again at each turn. The system prompt stays, and so does ``messages``.

        Raises ``InvalidArgument`` when there is no input, it makes no tokens, or the chat template refuses it.
        """
        if self._input is None:
            raise InvalidArgument("there is no prompt to compute: call set_input with index 0 first")
        if self._prompt is None or self._prompt[0] is not model or self._prompt[1] is not settings:
            self._prompt = (model, settings, self._make_prompt(model, settings, self._input, n_tokens_max))
        return self._prompt[2]

    def finish_turn(self, prompt: Prompt, answer: bytes) -> None:
        """Record the answer to a chat prompt; a raw prompt leaves no history."""
        if prompt.turn is not None:
            self._finished = (*prompt.turn, Message("assistant", answer.decode(errors="replace")))

    def _make_prompt(self, model: Model, settings: Settings, text: bytes, n_tokens_max: int) -> Prompt:
        if settings.model.embedding or (settings.session.prompt_mode or self._default_mode) == "raw":
            tokens = model.vocabulary.tokenize(text, add_special=True, parse_special=True)
            prompt = Prompt(tokens, None, opens_reasoning=opens_reasoning(text))
        else:
            turn = (*self._messages, Message("user", text.decode(errors="replace")))
            prompt = self._chat_prompt(model, settings, turn)
            if len(prompt.tokens) > n_tokens_max and settings.memory.context_shifting:
                while len(prompt.tokens) > n_tokens_max // 2 and self._n_left_out + 2 < len(turn):
                    self._n_left_out += 2
                    prompt = self._chat_prompt(model, settings, turn)
        if not prompt.tokens or (settings.model.embedding and not text):
            raise InvalidArgument("the prompt is empty: it makes no tokens")
        return prompt

    def _chat_prompt(self, model: Model, settings: Settings, turn: tuple[Message, ...]) -> Prompt:
        vocabulary, session = model.vocabulary, settings.session
        template, control_texts = (
            self._templates.get(model, session.chat_template),
            self._templates.control_texts(model),
        )
        rows = [replace(message, content=control_texts.cut(message.content)) for message in turn[self._n_left_out :]]
        if session.system_prompt:  # configuration, so its control tokens are meant
            rows.insert(0, Message("system", session.system_prompt))
        if session.tools and not template.shows_tools and not self._warned_of_tools:
            self._warned_of_tools = True
            _log.warning("the chat template has no place for session.tools: the model will not know of them")
        text = template.render(rows, tools=session.tools, enable_thinking=session.enable_thinking)
        # Some templates write the beginning-of-sequence token themselves: two of them make a model ramble.
        begins_itself = bool(vocabulary.bos_text) and text.startswith(vocabulary.bos_text)
        tokens = tokenize_in_parts(text, vocabulary, add_special=not begins_itself)
        return Prompt(tokens, turn, template.stops, opens_reasoning(text.encode(errors="replace")))
