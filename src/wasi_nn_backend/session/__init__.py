"""What one user is doing: pending input, conversation, the run that answers it."""

from __future__ import annotations

from wasi_nn_backend.session.chat import ChatTemplate, Message
from wasi_nn_backend.session.embedding import EmbeddingRun, embed_texts
from wasi_nn_backend.session.files import SessionFile, SessionFiles
from wasi_nn_backend.session.run import AnyRun, Run, count_prompt_tokens, start_run
from wasi_nn_backend.session.saved import SavedSession, model_fingerprint, read_session, write_session
from wasi_nn_backend.session.session import Prompt, Session
from wasi_nn_backend.session.templates import ChatTemplates

__all__ = [
    "AnyRun",
    "ChatTemplate",
    "ChatTemplates",
    "EmbeddingRun",
    "Message",
    "Prompt",
    "Run",
    "SavedSession",
    "Session",
    "SessionFile",
    "SessionFiles",
    "count_prompt_tokens",
    "embed_texts",
    "model_fingerprint",
    "read_session",
    "start_run",
    "write_session",
]
