"""What the engine does to the cells of a plan, where operations are refused or fail: the books never lie about them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeVar

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.conftest import n_examples
from tests.fakes.llama import FakeContext, FakeLlama, FakeModel
from wasi_nn_backend.engine.memory import ExportedCells, SequenceMemory
from wasi_nn_backend.errors import RuntimeFailure
from wasi_nn_backend.kvcache import CopyStream, KvOperation, StreamPool
from wasi_nn_backend.llama.interface import ContextParams, DecodeBatch, ModelParams

PARAMS = ContextParams(n_ctx=256, n_sequences=3, n_batch=256)
COMMON = list(b"what all the prompts of this test begin with; ")
PROMPTS = [
    COMMON + list(text) for text in (b"", b"one", b"one, and a long continuation", b"two, and another continuation")
]
PROMPTS.append(list(b"something else altogether"))

Result = TypeVar("Result")


class Refusing(FakeContext):
    """``outcomes`` says of each call that may go wrong what becomes of it; it goes right when there are no more."""

    outcomes: Iterable[str] = ()

    def remove(self, sequence_id: int, first_position: int, end_position: int = -1) -> bool:
        if first_position <= 0:
            return super().remove(sequence_id, first_position, end_position)
        return self._try(lambda: super(Refusing, self).remove(sequence_id, first_position, end_position))

    def copy(self, source_id: int, target_id: int, first_position: int = 0, end_position: int = -1) -> bool:
        is_copied = self._try(lambda: super(Refusing, self).copy(source_id, target_id, first_position, end_position))
        if not is_copied:
            self.remove(target_id, 0)
        return is_copied

    def save_sequence(self, sequence_id: int) -> bytes:
        state = self._try(lambda: super(Refusing, self).save_sequence(sequence_id))
        if not state:
            raise RuntimeFailure("could not be saved")
        return state

    def restore_sequence(self, sequence_id: int, state: bytes) -> bool:
        return self._try(lambda: super(Refusing, self).restore_sequence(sequence_id, state))

    def _try(self, call: Callable[[], Result]) -> Result | bool:
        self.outcomes = iter(self.outcomes)
        match next(self.outcomes, "right"):
            case "refused":
                return False
            case "fault":
                raise ValueError("a bug")
        return call()


def new_model(path: Path = Path(__file__)) -> FakeModel:
    return FakeLlama().load_model(ModelParams(path))


def cells_of(context: FakeContext, sequence_id: int) -> list[list[int]]:
    cells: list[list[int]] = sorted(json.loads(FakeContext.save_sequence(context, sequence_id)))
    return cells


def decode(context: FakeContext, tokens: list[int], first_position: int, sequence_id: int) -> None:
    batch = DecodeBatch()
    batch.add(tokens, first_position, sequence_id, logits_for_last=True)
    context.decode(batch)


def computed(tokens: Iterable[int]) -> list[list[int]]:
    """The cells that computing the tokens anew gives."""
    context = FakeContext(new_model(), PARAMS)
    if tokens := list(tokens):
        decode(context, tokens, 0, 0)
    return cells_of(context, 0)


class Plans:
    """Plans as the scheduler makes them: some sessions start, some of them leave again for others, in one plan."""

    def __init__(self, outcomes: Iterable[str]) -> None:
        self.pool = StreamPool(PARAMS.n_sequences, PARAMS.n_ctx)
        self.context = Refusing(new_model(), PARAMS)
        self.context.outcomes = outcomes
        self.memory = SequenceMemory(self.context, self.pool)

    def carry_out(self, turns: list[tuple[int, int]]) -> None:
        running: dict[int, tuple[int, list[int]]] = {}  # session -> stream and prompt
        operations: list[KvOperation] = []
        for session_id, n_prompt in turns:
            if session_id in running:
                self.pool.release(running.pop(session_id)[0])
                operations += self.pool.evict(session_id)
            elif (assignment := self.pool.assign(session_id, PROMPTS[n_prompt])) is not None:
                operations += assignment.operations
                running[session_id] = assignment.stream, PROMPTS[n_prompt]
        self._apply(operations)
        for session_id, (stream, prompt) in running.items():
            n_cached = self.pool.n_tokens_of(session_id)
            decode(self.context, prompt[n_cached:], n_cached, stream)
            self.pool.append(stream, prompt[n_cached:])
        self.check()
        for stream, _ in running.values():
            self.pool.release(stream)

    def _apply(self, operations: list[KvOperation]) -> None:
        """As the engine does, also after a fault: it clears what the plan has touched."""
        try:
            cleared = self.memory.apply(operations)
        except ValueError:
            cleared = set(range(PARAMS.n_sequences))
            for stream in cleared:
                self.memory.clear(stream)
        for stream in cleared:
            assert cells_of(self.context, stream) == []
            self.pool.forget(stream)

    def check(self) -> None:
        """Cells of streams and states are what computing their sessions' tokens anew would give, and nothing else is
        kept in host memory."""
        for session_id in range(5):
            place = self.pool.place_of(session_id)
            if place is not None and place[0] is not None:
                assert cells_of(self.context, place[0]) == computed(place[1])
            elif place is not None:
                assert sorted(json.loads(self.memory.export(session_id).state)) == computed(place[1])
            self.check_export(session_id)
        assert self.pool.n_sessions_in_host == len(self.memory._states)

    def check_export(self, session_id: int) -> None:
        self.context.outcomes, outcomes = (), self.context.outcomes
        exported = self.memory.export(session_id)
        self.context.outcomes = outcomes
        assert len(exported.tokens) == self.pool.n_tokens_of(session_id)


turns = st.lists(st.tuples(st.integers(0, 4), st.integers(0, len(PROMPTS) - 1)), max_size=6)


@settings(deadline=None, max_examples=n_examples(150))
@given(st.lists(turns, max_size=6), st.lists(st.sampled_from(["right", "refused", "fault"]), max_size=30))
def test_whatever_fails_the_books_and_the_cells_agree(plans: list[list[tuple[int, int]]], outcomes: list[str]) -> None:
    world = Plans(outcomes)
    for plan in plans:
        world.carry_out(plan)
    for session_id in range(5):
        world.memory.forget(session_id)
    assert not world.memory._states
    while evicted := world.pool.evict_idle():
        world.memory.apply(evicted)
    assert world.context.n_cells_used() == 0


def test_what_is_copied_from_a_cleared_stream_is_computed_anew() -> None:
    """A session comes back from host memory and cannot be cut; another one of the same plan was to go on from it."""
    world = Plans([])
    world.carry_out([(0, 2)])
    world.memory.apply(world.pool.evict(0))
    world.context.outcomes = ["right", "refused"]  # restored, not cut
    operations = [*_assigned(world, 0, 1), *_assigned(world, 2, 3)]
    streams = {operation.target for operation in operations if isinstance(operation, CopyStream)}
    assert streams
    assert world.memory.apply(operations) >= streams
    assert all(cells_of(world.context, stream) == [] for stream in streams)


def test_a_state_that_a_fault_of_the_planning_kept_here_goes_with_its_session() -> None:
    """The books have moved the session back to a stream, and the operations that say so never came."""
    world = Plans([])
    world.carry_out([(0, 2)])
    world.memory.apply(world.pool.evict(0))
    assert world.memory._states
    assert _assigned(world, 0, 2)
    world.memory.forget(0)
    assert not world.memory._states


def test_exporting_a_session_whose_state_is_gone_gives_nothing() -> None:
    world = Plans([])
    world.carry_out([(0, 2)])
    world.pool.evict(0)
    assert world.memory.export(0) == ExportedCells()


def _assigned(world: Plans, session_id: int, n_prompt: int) -> tuple[KvOperation, ...]:
    assignment = world.pool.assign(session_id, PROMPTS[n_prompt])
    assert assignment is not None
    return assignment.operations
