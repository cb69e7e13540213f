"""What the writers of tiny models have in common: the weights, and the end of the file."""

from __future__ import annotations

from collections.abc import Mapping

import gguf
import numpy as np
import numpy.typing as npt


def finish_model(
    writer: gguf.GGUFWriter,
    random_shapes: Mapping[str, tuple[int, ...]],
    constants: Mapping[str, npt.NDArray[np.floating]],
) -> None:
    """Add tensors, float32, by their whole names, and write the file whose keys ``writer`` has. The random ones are the
    same each time."""
    random = np.random.Generator(np.random.PCG64(0))
    for name, shape in random_shapes.items():
        writer.add_tensor(name, random.normal(scale=0.3, size=shape).astype(np.float32))
    for name, values in constants.items():
        writer.add_tensor(name, values.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
