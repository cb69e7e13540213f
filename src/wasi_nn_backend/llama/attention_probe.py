"""How long a decode step's attention takes in each KV layout, with flash attention and without it, on this machine.

The model itself is too slow to be filled with tokens while somebody waits for it. So the measurement is made on a
stand-in: one layer with the model's attention heads and next to nothing else, written to a temporary file. Its cells
are filled half and a few steps are timed, all candidates in turn, so that a disturbance strikes them alike.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from wasi_nn_backend.errors import RuntimeFailure
from wasi_nn_backend.llama.interface import Context, ContextParams, DecodeBatch, DecodeStatus, KvLayout, Model
from wasi_nn_backend.llama.tiny_model import TinyShape, write_tiny_model

__all__ = ["N_FREE", "N_ROUNDS", "AttentionOption", "AttentionWork", "Samples", "measure"]

#: Steps that are timed for each option, and how many even where time is up or the option has lost already.
N_ROUNDS = 25
_MIN_ROUNDS = 5
#: An option whose shortest step takes so many times the shortest of all has lost.
_LOST = 2.0
#: Cells that the steps take behind the tokens.
N_FREE = N_ROUNDS + 1
#: Sequences in a unified cache for each one that runs: what does not run stays there until others need the cells, and
#: every step attends over it.
_UNIFIED_FILL = 2
_N_PROMPT_BATCH = 256
_N_EMBD = 32
_N_CTX_TRAIN = 1 << 20  # or llama.cpp warns of every context


@dataclass(frozen=True, slots=True)
class AttentionOption:
    kv_layout: KvLayout
    flash_attention: Literal["on", "off"]

    def __str__(self) -> str:
        return f"{self.kv_layout} {'with' if self.flash_attention == 'on' else 'without'} flash attention"


@dataclass(frozen=True, slots=True)
class AttentionWork:
    """What the cost of a step's attention depends on. ``n_tokens`` are cached in each of the sequences."""

    n_heads: int
    n_kv_heads: int
    n_embd_head: int
    n_tokens: int
    n_sequences: int
    n_threads: int
    cache_type_k: str
    cache_type_v: str


#: Seconds of each timed step, for each option that was measured.
Samples = Mapping[AttentionOption, Sequence[float]]


def measure(
    work: AttentionWork,
    options: Sequence[AttentionOption],
    load: Callable[[Path], Model],
    clock: Callable[[], float],
    budget_s: float,
) -> Samples:
    """Time steps of each option; those that ``budget_s`` leaves no time for are left out, the last ones first.

    Takes some 40 ms for an option with 500 tokens. Raises ``WasiNNError`` and
    ``OSError``: no room on the disk or in memory, or llama.cpp refuses.
    """
    deadline_s = clock() + budget_s
    with tempfile.TemporaryDirectory(prefix="wasi-nn-attention-") as folder:
        path = Path(folder) / "stand-in.gguf"
        shape = TinyShape(
            _N_EMBD, _N_EMBD, 1, work.n_heads, work.n_kv_heads, _N_CTX_TRAIN, n_embd_head=work.n_embd_head
        )
        write_tiny_model(path, quantization="f32", shape=shape)
        model = load(path)
        try:
            return _Race(model, work, clock, deadline_s).run(options)
        finally:
            model.close()


class _Race:
    """A context for each option, filled alike, and steps of them in turn."""

    def __init__(self, model: Model, work: AttentionWork, clock: Callable[[], float], deadline_s: float) -> None:
        self._model = model
        self._work = work
        self._clock = clock
        self._deadline_s = deadline_s

    def run(self, options: Sequence[AttentionOption]) -> Samples:
        contexts: dict[AttentionOption, Context] = {}
        try:
            for option in options:
                start_s = self._clock()
                contexts[option] = context = self._model.create_context(self._params(option))
                self._fill(context, option.kv_layout)
                self._step(context, 0)  # not timed: it builds the graph and carries out the copies
                now_s = self._clock()
                if now_s + (now_s - start_s) > self._deadline_s:
                    break
            return self._time_steps(contexts)
        finally:
            for context in contexts.values():
                context.close()

    def _time_steps(self, contexts: Mapping[AttentionOption, Context]) -> Samples:
        samples: dict[AttentionOption, list[float]] = {option: [] for option in contexts}
        running = list(contexts)
        for n_done in range(N_ROUNDS):
            if n_done >= _MIN_ROUNDS:
                best_s = min(map(min, samples.values()))
                running = [option for option in running if min(samples[option]) <= _LOST * best_s]
                if len(running) < 2 or self._clock() > self._deadline_s:
                    break
            for option in running:
                samples[option].append(self._step(contexts[option], 1 + n_done))
        return samples

    def _params(self, option: AttentionOption) -> ContextParams:
        work = self._work
        return ContextParams(
            n_ctx=work.n_tokens + N_FREE,
            n_sequences=work.n_sequences * (_UNIFIED_FILL if option.kv_layout == "unified" else 1),
            n_batch=_N_PROMPT_BATCH,
            n_ubatch=_N_PROMPT_BATCH,
            n_threads=work.n_threads,
            flash_attention=option.flash_attention,
            kv_layout=option.kv_layout,
            cache_type_k=work.cache_type_k,
            cache_type_v=work.cache_type_v,
        )

    def _fill(self, context: Context, kv_layout: KvLayout) -> None:
        work, batch = self._work, DecodeBatch()
        for first in range(0, work.n_tokens, _N_PROMPT_BATCH):
            batch.clear()
            batch.add([7] * min(_N_PROMPT_BATCH, work.n_tokens - first), first, 0, logits_for_last=True)
            self._decode(context, batch)
        if kv_layout == "streams":
            for sequence_id in range(1, context.n_sequences):
                context.copy(0, sequence_id)
            return
        state = context.save_sequence(0)  # copies would share the cells, and cost next to nothing
        for sequence_id in range(1, context.n_sequences):
            if not context.restore_sequence(sequence_id, state):
                raise RuntimeFailure("the cells of the stand-in could not be copied")

    def _step(self, context: Context, step: int) -> float:
        batch = DecodeBatch()
        for sequence_id in range(self._work.n_sequences):
            batch.add([7], self._work.n_tokens + step, sequence_id, logits_for_last=True)
        start_s = self._clock()
        self._decode(context, batch)
        return self._clock() - start_s

    @staticmethod
    def _decode(context: Context, batch: DecodeBatch) -> None:
        if context.decode(batch) is not DecodeStatus.DONE:
            raise RuntimeFailure("llama.cpp found no room for the stand-in's tokens")
