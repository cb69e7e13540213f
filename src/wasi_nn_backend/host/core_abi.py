"""The calls of core modules, in the order in which a guest makes them: look up, delegate, convert.

Every method is one imported function of the same name; its arguments are the guest's words, already unsigned. It
returns nothing, or the address that the guest asked for, and raises a ``WasiNNError``, which ``host/linker.py`` turns
into the dialect's number. Out-pointers are checked before the work, so that a bad one neither leaks a graph nor costs a
compute. Every pointer and length goes through ``GuestMemory``, every number through the dialect's tables.
"""

from __future__ import annotations

import json
import logging
import re
from typing import TYPE_CHECKING

from wasi_nn_backend.errors import InvalidArgument, TooLarge
from wasi_nn_backend.host.memory import GuestMemory, TensorWords
from wasi_nn_backend.host.state import PRELOAD_PREFIX, GuestState
from wasi_nn_backend.types import CONFIG_INDEX, METADATA_INDEX, PROMPT_INDEX, TEXT_INDEX, Tensor

if TYPE_CHECKING:
    from wasi_nn_backend.execution_context import ExecutionContext
    from wasi_nn_backend.graph import Graph

__all__ = ["CoreAbi"]

#: How guests of WasmEdge put a picture into a prompt.
_IMAGE = re.compile(rb"<img src=\"data:image/[^;\"]{1,64};base64,")
#: Compilers give something empty its alignment for an address. What lies above may be a buffer.
_DANGLING_ADDRESS_MAX = 16

_log = logging.getLogger(__name__)


class CoreAbi:
    """The union of the core dialects' functions over one store's state."""

    def __init__(self, state: GuestState) -> None:
        self._state = state
        self._has_warned_of_unsized_buffers = False

    # --- graphs ---

    def load(
        self, memory: GuestMemory, builders: int, n_builders: int, encoding: int, target: int, out_graph: int
    ) -> None:
        """A model from the guest's memory, and configuration JSON as a second builder.

        Refused unless the host's limits allow it; ``preload:`` paths always.
        """
        state, dialect = self._state, self._state.dialect
        memory.check_u32(out_graph, "out_graph")
        graph_encoding, graph_target = dialect.encoding(encoding), dialect.target(target)
        parts = self._read_builders(memory, builders, n_builders)
        with state.graphs.reserve() as publish:
            handle = publish(
                state.backend.load(parts, graph_encoding, graph_target, door=dialect.door, progress=state.may_go_on)
            )
        state.models.keep(handle, sum(map(len, parts)))
        memory.write_u32(out_graph, handle, "out_graph")

    def load_by_name(self, memory: GuestMemory, name: int, n_name_bytes: int, out_graph: int) -> None:
        self._load_by_name(memory, name, n_name_bytes, None, out_graph)

    def load_by_name_with_config(
        self, memory: GuestMemory, name: int, n_name_bytes: int, config: int, n_config_bytes: int, out_graph: int
    ) -> None:
        """``load_by_name`` with configuration JSON; a length of 0 means none."""
        document = memory.read(
            config, n_config_bytes, "the configuration", max_bytes=self._state.limits.max_config_bytes
        )
        self._load_by_name(memory, name, n_name_bytes, document or None, out_graph)

    def unload(self, memory: GuestMemory, graph: int) -> None:
        """End a graph. Contexts on it can still be read and finalized, the backend refuses them everything else."""
        state = self._state
        removed = state.graphs.remove(graph)
        state.end_runs_on(removed)
        removed.unload()
        state.models.keep(graph, 0)
        state.held.keep(("graph", graph), 0)

    # --- execution contexts ---

    def init_execution_context(self, memory: GuestMemory, graph: int, out_context: int) -> None:
        memory.check_u32(out_context, "out_context")
        loaded = self._state.graphs.get(graph)
        with self._state.contexts.reserve() as publish:
            handle = publish(loaded.init_execution_context())
        memory.write_u32(out_context, handle, "out_context")

    def set_input(self, memory: GuestMemory, context: int, index: int, tensor: int) -> None:
        """Input 1 is configuration JSON, any other the prompt.

        The dimensions have to lie in memory but say nothing about the length: guests in the field send ``[1]``.
        """
        state, limits = self._state, self._state.limits
        found = state.contexts.get(context)
        words = self._read_tensor(memory, tensor)
        is_config = index == CONFIG_INDEX
        max_bytes = min(limits.max_tensor_bytes, limits.max_config_bytes if is_config else limits.max_prompt_bytes)
        state.held.check((context, is_config), min(words.n_data_bytes, max_bytes))
        value = Tensor(
            data=memory.read(words.data, words.n_data_bytes, "the tensor's data", max_bytes=max_bytes),
            dimensions=memory.read_dimensions(words.dims, words.n_dims, max_dims=limits.max_dims),
            type=self._state.dialect.tensor_type(words.type_word),
        )
        if is_config:  # may name a session, which is a context that other handles may have, too
            state.contexts.replace(context, found.graph.configure(found, value.data))
        else:
            self._refuse_image(context, value.data)
            found.set_input(index, value)
            state.end_run(context)
        state.held.keep((context, is_config), len(value.data))

    def compute(self, memory: GuestMemory, context: int) -> None:
        self._state.end_run(context)
        with self._state.running(self._state.contexts.get(context)) as running:
            running.compute(stdout=self._state.write_stdout)

    def get_output(
        self, memory: GuestMemory, context: int, index: int, buffer: int, n_buffer_bytes: int, out_n_bytes: int
    ) -> None:
        """The text, or metadata JSON at index 1. Too small a buffer stays untouched and learns the size needed."""
        found = self._check_output_call(memory, context, buffer, n_buffer_bytes, out_n_bytes)
        output = self._metadata(found) if index == METADATA_INDEX else found.get_output(index)
        self._write_output(memory, output, buffer, n_buffer_bytes, out_n_bytes)

    def finalize_execution_context(self, memory: GuestMemory, context: int) -> None:
        state = self._state
        state.end_run(context)
        state.contexts.remove(context).close()
        state.held.keep((context, True), 0)
        state.held.keep((context, False), 0)

    # --- token by token ---

    def compute_single(self, memory: GuestMemory, context: int) -> None:
        """One token. 100 at the end of the text, 101 when the context is full."""
        state = self._state
        with state.running(state.contexts.get(context)) as running, state.open_run(context):
            running.compute_single(stdout=state.write_stdout)

    def get_output_single(
        self, memory: GuestMemory, context: int, index: int, buffer: int, n_buffer_bytes: int, out_n_bytes: int
    ) -> None:
        """The last token's text, or metadata JSON at index 1; as ``get_output`` otherwise."""
        found = self._check_output_call(memory, context, buffer, n_buffer_bytes, out_n_bytes)
        output = self._metadata(found) if index == METADATA_INDEX else found.get_output_single(index)
        self._write_output(memory, output, buffer, n_buffer_bytes, out_n_bytes)

    def fini_single(self, memory: GuestMemory, context: int) -> None:
        found = self._state.contexts.get(context)
        self._state.end_run(context)
        found.fini_single()

    # --- a whole answer ---

    def run_inference(self, memory: GuestMemory, prompt: int, n_prompt_bytes: int) -> int:
        """set_input, compute and get_output on the context opened last; returns the address of a NUL-terminated text in
        a block of the guest's ``malloc``, for the guest to free."""
        state = self._state
        handle = state.contexts.newest()
        context = state.contexts.get(handle)
        malloc = memory.allocator()
        max_bytes = min(state.limits.max_tensor_bytes, state.limits.max_prompt_bytes)
        text = memory.read(prompt, n_prompt_bytes, "the prompt", max_bytes=max_bytes)
        state.held.check((handle, False), len(text))
        with state.running(context) as running:
            running.set_input(PROMPT_INDEX, Tensor(text))
            state.end_run(handle)
            state.held.keep((handle, False), len(text))
            running.compute(stdout=state.write_stdout)
        with state.inside_guest():
            return memory.place_text(malloc, context.get_output(TEXT_INDEX))

    # --- shared steps ---

    def _read_tensor(self, memory: GuestMemory, address: int) -> TensorWords:
        return memory.read_tensor(address)

    def _load_by_name(
        self, memory: GuestMemory, name: int, n_name_bytes: int, config: bytes | None, out_graph: int
    ) -> None:
        state = self._state
        memory.check_u32(out_graph, "out_graph")
        graph_name = memory.read_name(name, n_name_bytes, max_bytes=state.limits.max_name_bytes)
        n_config_bytes = len(config or b"")
        state.held.check(None, n_config_bytes)
        with state.graphs.reserve() as publish:
            handle = publish(self._open_graph(graph_name, config))
        state.held.keep(("graph", handle), n_config_bytes)
        memory.write_u32(out_graph, handle, "out_graph")

    def _open_graph(self, name: str, config: bytes | None) -> Graph:
        state = self._state
        if config is None:
            return state.backend.load_by_name(name, door=state.dialect.door, progress=state.may_go_on)
        return state.backend.load_by_name_with_config(name, config, door=state.dialect.door, progress=state.may_go_on)

    def _read_builders(self, memory: GuestMemory, builders: int, n_builders: int) -> list[bytes]:
        limits = self._state.limits
        spans = memory.read_builders(builders, n_builders, max_builders=limits.max_builders)
        if not spans:
            raise InvalidArgument("load: no builder was passed: pass the model's bytes as the first one")
        address, n_bytes = spans[0]
        head = memory.read(address, min(n_bytes, len(PRELOAD_PREFIX)), "the first builder")
        self._state.check_builders(head, sum(size for _, size in spans))
        return [memory.read(address, n_bytes, "a builder") for address, n_bytes in spans]

    def _check_output_call(
        self, memory: GuestMemory, context: int, buffer: int, n_buffer_bytes: int, out_n_bytes: int
    ) -> ExecutionContext:
        memory.check_u32(out_n_bytes, "out_n_bytes")
        memory.check(buffer, n_buffer_bytes, "the output buffer")
        return self._state.contexts.get(context)

    def _metadata(self, context: ExecutionContext) -> bytes:
        keys = self._state.dialect.metadata_keys
        if keys is None:
            return context.get_output(METADATA_INDEX)
        metadata = context.metadata
        # The default separators are WasmEdge's spacing, which guests that take the text apart by hand rely on.
        return json.dumps({key: metadata[key] for key in keys}).encode()

    def _refuse_image(self, context: int, prompt: bytes) -> None:
        """Read as text, a picture would be thousands of tokens about nothing. Guests compute whatever set_input said:
        without the prompt before, they get an error instead of an answer to that one."""
        state = self._state
        if _IMAGE.search(prompt):
            state.contexts.get(context).drop_input()
            state.end_run(context)
            state.held.keep((context, False), 0)
            raise InvalidArgument(
                "the prompt has an image in it, and this backend has no images: send the text alone, without the img "
                "tag"
            )

    def _write_output(
        self, memory: GuestMemory, output: bytes, buffer: int, n_buffer_bytes: int, out_n_bytes: int
    ) -> None:
        if not n_buffer_bytes and output:
            n_buffer_bytes = self._unsized_room(memory, buffer)
        if len(output) > n_buffer_bytes:
            memory.write_u32(out_n_bytes, len(output), "out_n_bytes")
            raise TooLarge(
                f"the output of {len(output)} bytes does not fit the buffer of {n_buffer_bytes}: "
                "call again with a buffer of the size stored",
                n_bytes_needed=len(output),
            )
        memory.write(buffer, output, "the output buffer")
        memory.write_u32(out_n_bytes, len(output), "out_n_bytes")

    def _unsized_room(self, memory: GuestMemory, buffer: int) -> int:
        """What counts as the length of a buffer that was passed with the length 0."""
        state = self._state
        if buffer <= _DANGLING_ADDRESS_MAX or not state.dialect.leaves_buffers_unsized:
            return 0
        if not state.limits.unsized_output_bytes and not self._has_warned_of_unsized_buffers:
            self._has_warned_of_unsized_buffers = True
            _log.warning(
                "the guest asks for output into a buffer at address %d of length 0, and gets error 7: programs built "
                "with llama-core need --unsized-output-bytes 245888 (in Python HostLimits.unsized_output_bytes)",
                buffer,
            )
        return max(0, min(state.limits.unsized_output_bytes, memory.n_bytes - buffer))
