"""WasmEdge's ggml ABI, which most language-model modules in the field were built for.

It is the witx ABI with six more functions and the same numbers where both have one; tensor types 2 and 5 pass here as
well, since prompts are bytes whatever their type says and older modules number their types differently. WasmEdge
knows more encodings (7 neuralspeed and on); none of them is a language model that llama.cpp can load, so they stay
unknown.

Modules pass ``dims = [1]`` whatever the length, and index exactly four keys of the metadata. Where a name is loaded
twice, WasmEdge returns the first graph and ignores the second configuration; here each load is a graph of its own
with its own configuration, since a guest that sends one expects it to count.
"""

from __future__ import annotations

from wasi_nn_backend.dialects.table import Dialect, frozen
from wasi_nn_backend.dialects.witx import WITX
from wasi_nn_backend.types import Door, ExecutionTarget, GraphEncoding

__all__ = ["WASMEDGE"]

WASMEDGE = Dialect(
    name="wasmedge",
    import_module="wasi_ephemeral_nn",
    door=Door(
        name="wasmedge",
        prompt_mode="raw",
        is_trusted=False,
        # Modules send keys of many versions, and WasmEdge passes over those that it does not know.
        unknown_keys="ignore",
        # For WasmEdge a negative temperature is 0, and guests send -1 for "greedy".
        raised_keys=frozenset({("sampling", "temperature")}),
        # What a WasmEdge guest gets when it sets nothing; the sampler defaults of llama.cpp's common library.
        defaults=frozen(
            {**WITX.door.defaults, "sampling": frozen({"temperature": 0.8, "top_p": 0.95, "repeat_penalty": 1.0})}
        ),
    ),
    functions=frozen(
        {
            **WITX.functions,
            "load_by_name_with_config": ("name", "n_name_bytes", "config", "n_config_bytes", "out_graph"),
            "compute_single": ("context",),
            "get_output_single": ("context", "index", "buffer", "n_buffer_bytes", "out_n_bytes"),
            "fini_single": ("context",),
            "finalize_execution_context": ("context",),
            "unload": ("graph",),
        }
    ),
    errnos=WITX.errnos,
    tensor_types=WITX.tensor_types,
    # Both numbers load GGUF: 6 is WasmEdge's ggml, 5 its autodetect and the ggml of hosts that number as the WIT
    # does.
    encodings=frozen({**WITX.encodings, 5: GraphEncoding.AUTODETECT, 6: GraphEncoding.GGML}),
    targets=frozen({0: ExecutionTarget.CPU, 1: ExecutionTarget.GPU, 2: ExecutionTarget.TPU}),
    metadata_keys=("input_tokens", "output_tokens", "llama_build_number", "llama_commit"),
    leaves_buffers_unsized=True,
)
