"""The child of ``amx_probe``: ``python -m wasi_nn_backend.llama.amx_probe_child FOLDER``.

Decodes 64 tokens at once and one more alone (other kernels) with a tiny model that has a matrix of every type that AMX
computes, with the extra buffer types and without, and writes ``result.json`` into the folder. It may die: that is its
answer.
"""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path

import numpy as np
import numpy.typing as npt

from wasi_nn_backend.errors import RuntimeFailure
from wasi_nn_backend.llama.interface import ContextParams, DecodeBatch, DecodeStatus, ModelParams
from wasi_nn_backend.llama.log_bridge import LogBridge
from wasi_nn_backend.llama.model import NativeModel
from wasi_nn_backend.llama.tiny_model import PROBE_SHAPE, write_tiny_model

__all__ = ["main", "prompt_logits", "relative_error"]

_N_PROMPT_TOKENS = 64
_QUANTISATIONS = ("q4_0", "q4_1", "q8_0", "q4_K", "q5_K", "q6_K", "iq4_xs", "f16")


def prompt_logits(
    path: Path, log: LogBridge, *, use_extra_buffers: bool, n_threads: int = 1
) -> npt.NDArray[np.float32]:
    """Logits of every token of a fixed prompt, and of one token after it, shape [65, n_vocab]."""
    with NativeModel(ModelParams(path), log, use_extra_buffers=use_extra_buffers) as model:
        tokens = [7 + 3 * index % 200 for index in range(_N_PROMPT_TOKENS + 1)]
        params = ContextParams(n_ctx=128, n_batch=64, n_ubatch=64, n_threads=n_threads)
        with model.create_context(params) as context:
            parts = []
            for first, last in ((0, _N_PROMPT_TOKENS), (_N_PROMPT_TOKENS, len(tokens))):
                batch = DecodeBatch()
                for position in range(first, last):
                    batch.add([tokens[position]], position, 0, logits_for_last=True)
                if context.decode(batch) is not DecodeStatus.DONE:
                    raise RuntimeFailure("the probe's decode did not finish")
                parts += [context.logits(row).copy() for row in range(len(batch))]
            return np.stack(parts)


def relative_error(values: npt.NDArray[np.float32], reference: npt.NDArray[np.float32]) -> float:
    """The length of the difference over the length of the reference."""
    return float(np.linalg.norm(values - reference) / np.linalg.norm(reference))


def main(folder: Path) -> None:
    model_path = folder / "probe.gguf"
    write_tiny_model(model_path, quantization=_QUANTISATIONS, shape=PROBE_SHAPE)
    log = LogBridge(logging.getLogger(__name__))
    plain = prompt_logits(model_path, log, use_extra_buffers=False)
    extra = prompt_logits(model_path, log, use_extra_buffers=True)
    result = {"relative_error": relative_error(extra, plain)}
    (folder / "result.json").write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
