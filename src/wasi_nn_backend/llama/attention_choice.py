"""Which KV layout to use, and flash attention or not: decided by a short measurement, once a machine.

What is best depends on the CPU and the model. A step of 16 sequences of 1,000 tokens took 73 ms in streams without
flash attention, 204 ms with it and 296 ms in the unified layout on one machine with AMX; with 50 tokens, and for some
models on other machines, flash attention is the faster. ``attention_probe`` measures one layer; here the numbers become
a choice, and are kept on disk. Where nothing can be measured the rule is streams on a CPU, with flash attention in
windows of one block and without it in larger ones; on a GPU llama.cpp decides.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from wasi_nn_backend.errors import InvalidArgument, WasiNNError
from wasi_nn_backend.llama.attention_cache import read_times, write_times
from wasi_nn_backend.llama.attention_probe import N_FREE, AttentionOption, AttentionWork, Samples
from wasi_nn_backend.llama.interface import AttentionChoice, ContextParams, KvLayout
from wasi_nn_backend.llama.kv_shape import N_CELLS_BLOCK, KvShape, cache_type, is_quantised, round_up_n_ctx

__all__ = [
    "AttentionFacts",
    "ProbeEnvironment",
    "choose",
    "decide",
    "is_disturbed",
    "options_for",
    "predict_step_s",
    "work_for",
]

OVERRIDE = "WASI_NN_ATTENTION_PROBE"
BUDGET_S = 0.5
#: Another option has to be faster than the first by this share of a step. Flash attention ties the steps of a sequence
#: that runs alone to one number of threads, the unified layout makes sessions disturb each other, and measurements of
#: one machine differ by as much: a few percent are not worth it.
MARGIN = 0.1
#: The same for flash attention where one sequence is expected to run alone: beside a busy process its steps, which then
#: keep all cores, took 2.2 times as long (two cores).
MARGIN_ALONE = 0.4
#: Windows up to which several sequences have flash attention unless that is clearly slower: without it, a fifth or more
#: of the cells that are computed are free there, on average.
_N_CTX_FLASH_MAX = 1024
#: Steps whose median is that many times the shortest were disturbed by other processes: they decide nothing.
MAX_DISTURBANCE = 1.5
_MIN_N_CTX = 128
#: Beyond, a step's cost grows in proportion to the tokens for every option, and that of filling the cells with its
#: square. Also a bound for the time of the measurement: sequences, and the width of all queries of a token.
_MAX_TOKENS = 512
_MAX_SEQUENCES = 8
_MAX_QUERY_VALUES = 1024
#: What a fast core reads, and computes with AMX. Everything but attention takes at least so long.
_BYTES_PER_S = 20e9
_FLOPS = 150e9
#: Models with a sliding window have it in a half (Gemma 2, gpt-oss) to five sixths (Gemma 3) of their layers.
_SLIDING_LAYERS = 0.75


@dataclass(frozen=True, slots=True)
class AttentionFacts:
    """What the choice has to know of a model.

    The unified layout may have ``n_sequences_unified_max`` sequences, and computes the same as streams do up to
    ``n_cells_unified_max`` cells (0: never).
    """

    architecture: str
    kv_shape: KvShape
    n_swa: int
    n_params: int
    n_weight_bytes: int
    on_gpu: bool
    n_sequences_unified_max: int
    n_cells_unified_max: int


@dataclass(frozen=True, slots=True)
class ProbeEnvironment:
    """All that a measurement depends on beside the model; tests put their own in.

    ``override`` "0" leaves it to the rule. ``measure`` gets the work, the options and seconds that it may take.
    """

    override: str | None
    cpu_name: str
    library_hash: Callable[[], str]
    cache_path: Path | None
    measure: Callable[[AttentionWork, Sequence[AttentionOption], float], Samples]


def choose(
    facts: AttentionFacts, params: ContextParams, layouts: Sequence[KvLayout], environment: ProbeEnvironment
) -> AttentionChoice:
    """See ``Model.choose_attention``. A measurement that fails is a reason for the rule, never an error.

    Raises ``InvalidArgument`` for an override other than 0 and 1.
    """
    if environment.override not in (None, "0", "1"):
        raise InvalidArgument(
            f"{OVERRIDE} in the environment is {environment.override!r}; set it to 0 or 1, or unset it"
        )
    if facts.on_gpu:
        return AttentionChoice(layouts[0], params.flash_attention, "on a GPU llama.cpp chooses")
    options = options_for(facts, params, _possible(layouts, facts, params))
    if len(options) == 1:
        return _choice(options[0], "nothing else is possible with this model and these settings")
    if environment.override == "0":
        return _choice(options[0], f"the rule, since {OVERRIDE} is 0")
    work = work_for(facts, params)
    if work is None:
        return _choice(options[0], "the rule, since attention of this kind cannot be measured on its own")
    key = f"{environment.library_hash()} {environment.cpu_name} {work} {list(map(str, options))}"
    layer_s, origin = read_times(environment.cache_path, key, options), "measured earlier"
    if layer_s is None:
        origin = "measured"
        try:
            samples = environment.measure(work, options, BUDGET_S)
        except (WasiNNError, OSError) as error:
            return _choice(options[0], f"the rule, since it could not be measured: {error}")
        if is_disturbed(samples):
            return _choice(options[0], "the rule, since other processes disturbed the measurement")
        # Not the median: others only ever make a step longer.
        layer_s = {option: min(times) for option, times in samples.items()}
        write_times(environment.cache_path, key, layer_s)
    steps_s = predict_step_s(facts, params, work, layer_s)
    is_tied = params.n_sequences_expected == 1 and params.n_ctx > N_CELLS_BLOCK
    choice = decide(_by_preference(options, params, steps_s), steps_s, MARGIN_ALONE if is_tied else MARGIN)
    return _choice(choice, f"{origin}: {_describe(steps_s, work)}")


def is_disturbed(samples: Samples) -> bool:
    """Whether the steps of the fastest option, or of one that it is held against to the end, differ too much."""
    n_most = max(map(len, samples.values()), default=0)
    finalists = [times for times in samples.values() if len(times) == n_most]
    return any(statistics.median(times) > MAX_DISTURBANCE * min(times) for times in finalists)


def _possible(layouts: Sequence[KvLayout], facts: AttentionFacts, params: ContextParams) -> Sequence[KvLayout]:
    """Of several layouts, those that fit. Where memory is left for one stream alone, sequences had better share it."""
    if len(layouts) == 1:
        return layouts
    n_sequences, n_cells = params.n_sequences, params.n_cells_total
    if not 1 < n_sequences <= facts.n_sequences_unified_max or n_cells > facts.n_cells_unified_max:
        return ("streams",)
    return ("unified",) if n_cells < 2 * params.n_ctx else layouts


def _choice(option: AttentionOption, reason: str) -> AttentionChoice:
    return AttentionChoice(option.kv_layout, option.flash_attention, reason)


def options_for(
    facts: AttentionFacts, params: ContextParams, layouts: Sequence[KvLayout]
) -> tuple[AttentionOption, ...]:
    """What the caller and the model leave open, the best by the rule first.

    In a window of one block flash attention comes first: it passes over the cells that are not used yet, which are all
    computed without it (steps of 16 sequences of 50 tokens took 64 instead of 85 ms, of 4 56 instead of 67, of 1 7.9
    instead of 8.4), and leaves the number of threads free.
    """
    possible = _flash_attention(facts, params)
    n_cells_seen: dict[KvLayout, int] = {"streams": params.n_ctx, "unified": params.n_cells_total}
    return tuple(
        AttentionOption(layout, flash_attention)
        for layout in sorted(layouts)  # streams before unified
        for flash_attention in (possible[::-1] if n_cells_seen[layout] <= N_CELLS_BLOCK else possible)
    )


def _flash_attention(facts: AttentionFacts, params: ContextParams) -> tuple[Literal["on", "off"], ...]:
    if params.flash_attention != "auto":
        return (params.flash_attention,)
    if is_quantised(cache_type(params.cache_type_v, "cache_type_v")):
        return ("on",)  # llama.cpp has no other way to read such a cache
    shape = facts.kv_shape
    blocks_fit = not is_quantised(cache_type(params.cache_type_k, "cache_type_k")) or shape.n_embd_head_k % 32 == 0
    if shape.n_embd_head_k != shape.n_embd_head_v or not blocks_fit or facts.architecture == "grok":
        return ("off",)
    return ("off", "on")


def work_for(facts: AttentionFacts, params: ContextParams) -> AttentionWork | None:
    """The measurement for a model and a context, rounded so that similar contexts share it. None: not possible.

    Of many heads only a part is measured: queries and keys left out in proportion.
    """
    shape = facts.kv_shape
    n_values = max(shape.n_key_values, default=0)
    n_embd_head = shape.n_embd_head_k
    n_kv_heads = n_values // n_embd_head if n_embd_head else 0
    if not n_kv_heads or shape.n_heads % n_kv_heads or n_embd_head % 2 or n_embd_head != shape.n_embd_head_v:
        return None
    divisors = [n for n in range(1, n_kv_heads + 1) if n_kv_heads % n == 0]
    fitting = (n for n in divisors if shape.n_heads // n * n_embd_head <= _MAX_QUERY_VALUES)
    n_parts = next(fitting, n_kv_heads)
    n_cells = min(_power_of_two(max(params.n_ctx, _MIN_N_CTX)) // 2, _MAX_TOKENS)
    return AttentionWork(
        n_heads=shape.n_heads // n_parts,
        n_kv_heads=n_kv_heads // n_parts,
        n_embd_head=n_embd_head,
        n_tokens=n_cells - N_FREE,  # llama.cpp reads blocks of 256 cells: the steps must not begin another
        n_sequences=min(_power_of_two(params.n_sequences), _MAX_SEQUENCES),
        n_threads=params.n_threads,
        cache_type_k=params.cache_type_k,
        cache_type_v=params.cache_type_v,
    )


def _power_of_two(n: int) -> int:
    """The smallest that is not below ``n``."""
    return 1 << max(0, n - 1).bit_length()


def predict_step_s(
    facts: AttentionFacts, params: ContextParams, work: AttentionWork, layer_s: Mapping[AttentionOption, float]
) -> dict[AttentionOption, float]:
    """Seconds of a whole step with half full windows: the model's layers, and the least that the rest can take.

    Without the rest a large model, which hardly notices its attention, would be ruled by it.
    """
    shape = facts.kv_shape
    n_layers = sum(n > 0 for n in shape.n_key_values) * shape.n_heads / work.n_heads
    rest_s = max(
        facts.n_weight_bytes / (_BYTES_PER_S * work.n_threads),
        2 * facts.n_params * work.n_sequences / (_FLOPS * work.n_threads),
    )
    return {
        option: rest_s + n_layers * seconds * _growth(option, facts, params, work)
        for option, seconds in layer_s.items()
    }


def _growth(option: AttentionOption, facts: AttentionFacts, params: ContextParams, work: AttentionWork) -> float:
    """How many times as much attention a step has on average, while windows fill up, as had the measured ones."""
    n_measured = work.n_tokens + N_FREE / 2
    n_tokens = params.n_ctx / 2
    if option.flash_attention == "on":  # passes over cells that are free, and over those outside of a sliding window
        n_outside = max(0.0, n_tokens - facts.n_swa) * _SLIDING_LAYERS if facts.n_swa else 0.0
        return (n_tokens - n_outside) / n_measured
    if option.kv_layout == "unified":  # all sequences' cells: a block more or less is nothing
        return n_tokens / n_measured
    # Whole blocks are computed, and what does not count is masked.
    return _mean_rounded(params.n_ctx) / round_up_n_ctx(work.n_tokens + N_FREE)


def _mean_rounded(n_ctx: int) -> float:
    """The mean of 1 to ``n_ctx`` cells, each rounded up to blocks."""
    n_whole = n_ctx // N_CELLS_BLOCK
    in_whole_blocks = N_CELLS_BLOCK**2 * n_whole * (n_whole + 1) // 2
    return (in_whole_blocks + (n_ctx - n_whole * N_CELLS_BLOCK) * N_CELLS_BLOCK * (n_whole + 1)) / n_ctx


def _by_preference(
    options: Sequence[AttentionOption], params: ContextParams, steps_s: Mapping[AttentionOption, float]
) -> Sequence[AttentionOption]:
    """By the rule, but flash attention first in small windows where several sequences are expected to run.

    Steps of 8 sequences of 520 tokens took 42 instead of 46 ms. It also suffers less from others that use the
    processor's caches: 57 instead of 70 ms at 1,000 tokens, which were equal on a quiet machine. The rule itself leaves
    it out, since that has to be right where nothing could be measured, and with AMX flash attention is far slower.
    """
    if params.n_sequences_expected == 1 or params.n_ctx > _N_CTX_FLASH_MAX:
        return options
    measured = [option for option in options if option in steps_s]
    measured.sort(key=lambda option: option != AttentionOption("streams", "on"))  # the others stay in their order
    return measured or options


def decide(
    options: Sequence[AttentionOption], steps_s: Mapping[AttentionOption, float], margin_flash: float = MARGIN
) -> AttentionOption:
    """The first option, unless a later one is faster by a clear margin; the same for every one after that.

    ``margin_flash`` is that of flash attention where what was chosen before has none.
    An option that was not measured (no time left) is chosen only if it is the first.
    """
    chosen = options[0]
    for option in options[1:]:
        margin = margin_flash if (chosen.flash_attention, option.flash_attention) == ("off", "on") else MARGIN
        if steps_s.get(option, math.inf) < (1 - margin) * steps_s.get(chosen, 0.0):
            chosen = option
    return chosen


def _describe(steps_s: Mapping[AttentionOption, float], work: AttentionWork) -> str:
    times = ", ".join(f"{option} {seconds * 1e3:.1f} ms" for option, seconds in steps_s.items())
    return f"a step of {work.n_sequences} sequences with half full windows would take {times}, or more"
