"""No key is parsed and then ignored: each has a test that fails if the program does not obey it."""

from __future__ import annotations

from tests.effects import changed_keys
from wasi_nn_backend.config.keys import SECTIONS

#: Keys of the queue and of named sessions, neither of which exist yet. Nothing is released with an entry here.
PENDING = {
    "backend.max_sessions",
    "backend.idle_timeout_ms",
    "backend.auto_cleanup",
    "session.session_id",
}


def test_every_key_has_a_test_that_shows_its_effect() -> None:
    known = {f"{section}.{key}" for section, model in SECTIONS.items() for key in model.model_fields}
    shown = set(changed_keys())
    assert shown - known == set(), "marked, but no key"
    assert known - shown - PENDING == set(), "a key without an effect that a test sees"
    assert PENDING & shown == set(), "done: take it off the list of what is pending"
    assert known >= PENDING
