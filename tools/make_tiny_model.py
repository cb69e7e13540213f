"""Write the tiny random model that the tests run on: a llama of some 250 kB, the same bytes for the same seed."""

from __future__ import annotations

import argparse
from pathlib import Path

from wasi_nn_backend.errors import WasiNNError
from wasi_nn_backend.llama.tiny_model import QUANTISATIONS, write_tiny_model


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="example: python tools/make_tiny_model.py tiny.gguf --quantization q8_0 --seed 7",
    )
    parser.add_argument("path", type=Path, help="the GGUF file to write")
    parser.add_argument("--quantization", default="f16", choices=QUANTISATIONS[:5], help="type of the weight matrices")
    parser.add_argument("--seed", type=int, default=0, help="another seed gives other weights (default: 0)")
    arguments = parser.parse_args()
    try:
        write_tiny_model(arguments.path, quantization=arguments.quantization, seed=arguments.seed)
    except (WasiNNError, OSError) as error:
        parser.error(str(error))
    print(f"{arguments.path}: {arguments.path.stat().st_size} bytes")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
