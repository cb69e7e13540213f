"""The configuration: documents become layers, layers become settings. One file a section.

``parse_layer`` and ``parse_assignments`` check what came from outside, once. ``resolve`` puts layers over the built-in
defaults and is cheap enough for every call.
"""

from __future__ import annotations

from wasi_nn_backend.config.layers import ConfigSource, Layer, resolve
from wasi_nn_backend.config.parse import log_warnings, parse_assignments, parse_layer
from wasi_nn_backend.config.settings import Settings

__all__ = ["ConfigSource", "Layer", "Settings", "log_warnings", "parse_assignments", "parse_layer", "resolve"]
