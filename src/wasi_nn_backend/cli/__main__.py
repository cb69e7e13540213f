"""Makes ``python -m wasi_nn_backend.cli`` the same as ``wasi-nn``."""

from __future__ import annotations

import sys

from wasi_nn_backend.cli import main

if __name__ == "__main__":
    sys.exit(main())
