"""The calls of WAMR's older header where they differ: no lengths in tensors, sizes that go in and out."""

from __future__ import annotations

from wasi_nn_backend.host.core_abi import CoreAbi
from wasi_nn_backend.host.memory import GuestMemory, TensorWords

__all__ = ["LegacyAbi"]


class LegacyAbi(CoreAbi):
    """``CoreAbi`` with the arguments of ``wasi_nn``."""

    def load(  # type: ignore[override]  # one argument for the array and its length
        self, memory: GuestMemory, builder_array: int, encoding: int, target: int, out_graph: int
    ) -> None:
        """``builder_array`` points to a pointer to the builders and their number."""
        builders, n_builders = memory.read_span(builder_array, "the builder array's head")
        super().load(memory, builders, n_builders, encoding, target, out_graph)

    def get_output(  # type: ignore[override]  # the capacity comes where the size goes
        self, memory: GuestMemory, context: int, index: int, buffer: int, inout_n_bytes: int
    ) -> None:
        """``inout_n_bytes`` points to the buffer's size, and receives the output's."""
        n_buffer_bytes = memory.read_u32(inout_n_bytes, "inout_n_bytes")
        super().get_output(memory, context, index, buffer, n_buffer_bytes, inout_n_bytes)

    def _read_tensor(self, memory: GuestMemory, address: int) -> TensorWords:
        return memory.read_legacy_tensor(address, max_dims=self._state.limits.max_dims)
