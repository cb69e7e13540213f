"""Puts the C libraries into the wheel where there is a C compiler; without one the wheel is pure Python."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class CLibraries(BuildHookInterface):
    """Runs for wheels. Editable installations compile when ``wasi-nn capi`` is asked for the libraries."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if version == "editable":
            return
        sys.path.insert(0, str(Path(self.root) / "src"))
        from wasi_nn_backend.capi.build import build_libraries  # noqa: PLC0415  importable only now
        from wasi_nn_backend.errors import UnsupportedOperation  # noqa: PLC0415

        folder = Path(tempfile.mkdtemp(prefix="wasi-nn-wheel-"))  # the wheel is written after this returns
        try:
            build_libraries(folder, self.metadata.version, is_installed=True)
        except UnsupportedOperation as error:
            self.app.display_warning(f"the wheel has no C libraries: {error}")
            return
        build_data["force_include"][str(folder)] = "wasi_nn_backend/capi/lib"
        build_data["pure_python"] = False
        build_data["infer_tag"] = True
