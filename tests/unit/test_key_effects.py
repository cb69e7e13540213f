"""No key is parsed and then ignored: each has a test that fails if the program does not obey it."""

from __future__ import annotations

from tests.effects import changed_keys
from wasi_nn_backend.config.keys import SECTIONS


def test_every_key_has_a_test_that_shows_its_effect() -> None:
    known = {f"{section}.{key}" for section, model in SECTIONS.items() for key in model.model_fields}
    shown = set(changed_keys())
    assert shown - known == set(), "marked, but no key"
    assert known - shown == set(), "a key without an effect that a test sees"
