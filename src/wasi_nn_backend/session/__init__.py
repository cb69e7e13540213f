"""What one user is doing: pending input, conversation, the run that answers it."""

from __future__ import annotations

from wasi_nn_backend.session.chat import ChatTemplate, Message
from wasi_nn_backend.session.run import N_CELLS_RESERVED, Run, start_run
from wasi_nn_backend.session.saved import SavedSession, model_fingerprint, read_session, write_session
from wasi_nn_backend.session.session import Prompt, Session

__all__ = [
    "N_CELLS_RESERVED",
    "ChatTemplate",
    "Message",
    "Prompt",
    "Run",
    "SavedSession",
    "Session",
    "model_fingerprint",
    "read_session",
    "start_run",
    "write_session",
]
