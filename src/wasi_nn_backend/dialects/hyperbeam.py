"""HyperBEAM's modules: the witx with a configuration at load, and one call for a whole answer.

``run_inference`` names no execution context: it is the one opened last. Its answer is a NUL-terminated string that the
host allocates through the guest's ``malloc``. Such modules have no ``_start``; HyperBEAM calls an export (``handle``)
with texts as NUL-terminated strings, and gets one back. Many have a 64-bit memory.
"""

from __future__ import annotations

from wasi_nn_backend.dialects.table import Dialect, frozen
from wasi_nn_backend.dialects.witx import WITX
from wasi_nn_backend.types import Door

__all__ = ["HYPERBEAM"]

HYPERBEAM = Dialect(
    name="hyperbeam",
    import_module="wasi_ephemeral_nn",
    door=Door(name="hyperbeam", prompt_mode="raw", is_trusted=False, defaults=WITX.door.defaults),
    functions=frozen(
        {
            **WITX.functions,
            "load_by_name_with_config": ("name", "n_name_bytes", "config", "n_config_bytes", "out_graph"),
            "run_inference": ("prompt", "n_prompt_bytes"),
        }
    ),
    errnos=WITX.errnos,
    tensor_types=WITX.tensor_types,
    encodings=WITX.encodings,
    targets=WITX.targets,
    metadata_keys=None,
    pointer_results=frozenset({"run_inference"}),
    exports_return_text=True,
)
