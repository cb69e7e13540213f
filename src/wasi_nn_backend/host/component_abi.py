"""The calls of components: the resources of ``wasi:nn``, and what each function does.

As in ``core_abi.py`` nothing is decided here that the backend decides: look up, delegate, convert. Arguments are
Python values already. A ``WasiNNError`` becomes an ``error`` resource in ``component_linker.py``, where the function's
type has room for one.

A resource's representation is a handle of this store, as core modules have them, but no guest ever sees it: the
component has numbers of its own, and wasmtime refuses those that it never gave out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from wasi_nn_backend.dialects.wit import (
    WIT,
    WIT_ENCODINGS,
    WIT_ERROR_CODES,
    WIT_INPUTS,
    WIT_OUTPUTS,
    WIT_TARGETS,
    WIT_TENSOR_TYPES,
)
from wasi_nn_backend.errors import Busy, InvalidArgument, TooLarge, WasiNNError
from wasi_nn_backend.handles import MAX_HANDLE, HandleTable
from wasi_nn_backend.host.state import GuestState
from wasi_nn_backend.types import CONFIG_INDEX, METADATA_INDEX, PROMPT_INDEX, TEXT_INDEX, Tensor, TensorType

if TYPE_CHECKING:
    from wasi_nn_backend.graph import Graph

__all__ = ["ComponentAbi"]

T = TypeVar("T")

_N_ERROR_CHARACTERS_MAX = 1024
_TENSOR_TYPE_NAMES = {kind: name for name, kind in WIT_TENSOR_TYPES.items()}


@dataclass(frozen=True, slots=True)
class _Error:
    """What an ``error`` resource holds: a name of the WIT's, and the text."""

    code: str
    text: str


@dataclass(slots=True)
class _GraphUse:
    """How many contexts stand on a graph, and whether the component has dropped it."""

    n_contexts: int = 0
    is_dropped: bool = False


@dataclass(slots=True)
class _ContextUse:
    """``output_names`` are those of the last prompt's outputs; None before the first prompt."""

    graph: int
    output_names: tuple[str, str] | None = None


class ComponentAbi:
    """The functions of ``wasi:nn`` over one store's state.

    Tensors that a component holds lie in the host, and count against ``limits.max_held_bytes``. Graphs live until
    the component has dropped them and every context on them: bindings drop a graph when its variable goes.
    """

    def __init__(self, state: GuestState) -> None:
        self._state = state
        # wasmtime lets a store have 100,000 resources at a time, so these tables need no limit of their own.
        self._tensors: HandleTable[Tensor | WasiNNError] = HandleTable("tensor", MAX_HANDLE, "drop one first")
        self._errors: HandleTable[_Error] = HandleTable("error", MAX_HANDLE, "drop one first")
        self._graphs: dict[int, _GraphUse] = {}
        self._contexts: dict[int, _ContextUse] = {}

    # --- tensors ---

    def new_tensor(self, dimensions: tuple[int, ...], type_name: str, data: bytes) -> int:
        """A constructor cannot fail: a tensor that is refused remembers why, and computing with it gives the error."""
        tensor = Tensor(data, dimensions, _named(WIT_TENSOR_TYPES, type_name))
        return self._keep(self._refusal(tensor) or tensor)

    def tensor_dimensions(self, tensor: int) -> tuple[int, ...]:
        return self._shown(tensor).dimensions

    def tensor_type(self, tensor: int) -> str:
        return _TENSOR_TYPE_NAMES[self._shown(tensor).type]

    def tensor_data(self, tensor: int) -> bytes:
        return self._shown(tensor).data

    def drop_tensor(self, tensor: int) -> None:
        self._take(tensor)

    # --- errors ---

    def new_error(self, code: str, text: str) -> int:
        """An error resource. Components may make their own, and as many as they like, so their texts are cut."""
        if code not in WIT_ERROR_CODES:
            raise InvalidArgument(f"there is no error code {code[:64]!r}: build the component with wasi:nn's WIT")
        with self._errors.reserve() as publish:
            # Unlike a Python string, one of the component model is UTF-8.
            return publish(_Error(code, text[:_N_ERROR_CHARACTERS_MAX].encode(errors="replace").decode()))

    def record_error(self, function: str, error: WasiNNError) -> int:
        """An error resource for a call that failed, remembered for the report about this guest."""
        text = str(error)
        for name in self._state.backend.registry.names():
            # Where the host keeps its models is none of the guest's business. The report and the log have it in full.
            if (registration := self._state.backend.registry.find(name)) is not None:
                text = text.replace(str(registration.path), f'the model of "{name}"')
        return self.new_error(WIT_ERROR_CODES[self._state.record_error(function, error)], text)

    def record_fault(self, function: str, error: BaseException) -> int:
        """The same for a defect of this program, whose text is none of the guest's."""
        code = WIT_ERROR_CODES[self._state.record_fault(function, error)]
        return self.new_error(code, "the host failed to carry out this call; its log says why")

    def error_code(self, error: int) -> str:
        return self._errors.get(error).code

    def error_text(self, error: int) -> str:
        return self._errors.get(error).text

    def drop_error(self, error: int) -> None:
        self._errors.remove(error)

    # --- graphs ---

    def load(self, builders: Sequence[bytes], encoding: str, target: str) -> int:
        """A model from the component's memory, and configuration JSON as a second builder, where the host allows it."""
        state = self._state
        self._check_builders(builders)
        model_encoding, model_target = _named(WIT_ENCODINGS, encoding), _named(WIT_TARGETS, target)
        graph = self._open_graph(
            lambda: state.backend.load(builders, model_encoding, model_target, door=WIT.door, progress=state.may_go_on)
        )
        state.models.keep(graph, sum(map(len, builders)))
        return graph

    def load_by_name(self, name: str) -> int:
        state = self._state
        if len(name.encode()) > state.limits.max_name_bytes:
            raise TooLarge(f"a graph's name may have {state.limits.max_name_bytes} bytes: load a shorter one")
        if "\0" in name:
            raise InvalidArgument(f"the name {name[:64]!r} has a NUL in it: pass it without a terminator")
        return self._open_graph(lambda: state.backend.load_by_name(name, door=WIT.door, progress=state.may_go_on))

    def init_execution_context(self, graph: int) -> int:
        loaded = self._state.graphs.get(graph)
        with self._state.contexts.reserve() as publish:
            context = publish(loaded.init_execution_context())
        self._graphs[graph].n_contexts += 1
        self._contexts[context] = _ContextUse(graph)
        return context

    def drop_graph(self, graph: int) -> None:
        self._graphs[graph].is_dropped = True
        self._unload_if_unused(graph)

    # --- execution contexts ---

    def compute(self, context: int, inputs: Sequence[tuple[str, int]]) -> list[tuple[str, int]]:
        """Take configuration, then generate for the prompt; the outputs are the text and metadata JSON.

        Without a prompt nothing is generated: the last outputs are given again, among them what there was of a text
        whose run ended with an error. The tensors belong to the host from here on, and are gone after the call.
        """
        state, use = self._state, self._contexts[context]
        # All of them first: also those behind the first wrong one are to be freed.
        tensors = [(name, self._take(tensor)) for name, tensor in inputs]
        by_index = self._by_index(tensors)
        # Not for what the host computes: outputs are handed over, and those after them only when there is room again.
        state.held.check(None, 0)
        found = state.contexts.get(context)
        if (config := by_index.get(CONFIG_INDEX)) is not None:
            found = found.graph.configure(found, config[1].data)
            state.contexts.replace(context, found)
            state.held.keep((context, CONFIG_INDEX), len(config[1].data))
        if (prompt := by_index.get(PROMPT_INDEX)) is not None:
            use.output_names = WIT_OUTPUTS[prompt[0]]
            found.set_input(PROMPT_INDEX, prompt[1])
            state.held.keep((context, PROMPT_INDEX), len(prompt[1].data))
            with state.running(found) as running:
                running.compute(stdout=state.write_stdout)
        elif use.output_names is None:
            if config is None:
                raise InvalidArgument('compute: there is no input: pass the prompt as "prompt" or "0"')
            return []
        text_name, metadata_name = use.output_names
        outputs = [(text_name, found.get_output(TEXT_INDEX)), (metadata_name, found.get_output(METADATA_INDEX))]
        return [(name, self._keep(Tensor(data, (len(data),), TensorType.U8))) for name, data in outputs]

    def drop_context(self, context: int) -> None:
        graph = self._contexts.pop(context).graph
        self._graphs[graph].n_contexts -= 1
        self._state.held.keep((context, CONFIG_INDEX), 0)
        self._state.held.keep((context, PROMPT_INDEX), 0)
        try:
            self._state.contexts.remove(context).close()
        finally:
            self._unload_if_unused(graph)

    # --- shared steps ---

    def _open_graph(self, load: Callable[[], Graph]) -> int:
        with self._state.graphs.reserve() as publish:
            graph = publish(load())
        self._graphs[graph] = _GraphUse()
        return graph

    def _unload_if_unused(self, graph: int) -> None:
        use = self._graphs[graph]
        if use.is_dropped and use.n_contexts == 0:
            del self._graphs[graph]
            self._state.models.keep(graph, 0)
            self._state.graphs.remove(graph).unload()

    def _check_builders(self, builders: Sequence[bytes]) -> None:
        limits = self._state.limits
        if not builders:
            raise InvalidArgument("load: no builder was passed: pass the model's bytes as the first one")
        if len(builders) > limits.max_builders:
            raise TooLarge(
                f"load: {len(builders)} builders are more than the {limits.max_builders} that this host takes"
            )
        self._state.check_builders(builders[0], sum(map(len, builders)))

    def _by_index(self, inputs: Sequence[tuple[str, Tensor | WasiNNError]]) -> dict[int, tuple[str, Tensor]]:
        """Index -> the name that was used for it, and the tensor. Raises ``InvalidArgument``, ``TooLarge``."""
        limits = self._state.limits
        by_index: dict[int, tuple[str, Tensor]] = {}
        for name, tensor in inputs:
            index = WIT_INPUTS.get(name)
            if index is None:
                raise InvalidArgument(f"compute: no input is named {name[:64]!r}: there are {', '.join(WIT_INPUTS)}")
            if index in by_index:
                raise InvalidArgument(f"compute: the inputs {by_index[index][0]!r} and {name!r} are the same: pass one")
            if not isinstance(tensor, Tensor):
                raise tensor
            n_bytes_max = limits.max_config_bytes if index == CONFIG_INDEX else limits.max_prompt_bytes
            if len(tensor.data) > n_bytes_max:
                raise TooLarge(
                    f"compute: the input {name!r} has {len(tensor.data)} bytes, this host takes {n_bytes_max}"
                )
            by_index[index] = name, tensor
        return by_index

    # --- tensors in the host ---

    def _refusal(self, tensor: Tensor) -> WasiNNError | None:
        """Why the component may not keep a tensor in the host. What the host itself computed is not asked."""
        limits = self._state.limits
        if len(tensor.dimensions) > limits.max_dims:
            return TooLarge(f"the tensor has {len(tensor.dimensions)} dimensions, this host takes {limits.max_dims}")
        if len(tensor.data) > limits.max_tensor_bytes:
            return TooLarge(f"the tensor has {len(tensor.data)} bytes, this host takes {limits.max_tensor_bytes}")
        try:
            self._state.held.check(None, len(tensor.data))
        except Busy as error:
            return error
        return None

    def _keep(self, tensor: Tensor | WasiNNError) -> int:
        with self._tensors.reserve() as publish:
            handle = publish(tensor)
        if isinstance(tensor, Tensor):
            self._state.held.keep(("tensor", handle), len(tensor.data))
        return handle

    def _take(self, tensor: int) -> Tensor | WasiNNError:
        taken = self._tensors.remove(tensor)
        self._state.held.keep(("tensor", tensor), 0)
        return taken

    def _shown(self, tensor: int) -> Tensor:
        """A tensor that was refused has nothing in it."""
        found = self._tensors.get(tensor)
        return found if isinstance(found, Tensor) else Tensor(b"")


def _named(table: Mapping[str, T], name: str) -> T:
    """What an enum's name stands for. A component that was built with another enum may pass any."""
    try:
        return table[name]
    except KeyError:
        names = ", ".join(table)
        raise InvalidArgument(f"{name[:64]!r} is none of {names}: build the component with wasi:nn's WIT") from None
