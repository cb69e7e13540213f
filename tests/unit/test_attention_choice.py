"""From times to a choice of KV layout and flash attention, on machines that do not exist here."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wasi_nn_backend.errors import InvalidArgument, RuntimeFailure
from wasi_nn_backend.llama.attention_choice import (
    BUDGET_S,
    MARGIN,
    AttentionFacts,
    ProbeEnvironment,
    choose,
    decide,
    is_disturbed,
    options_for,
    predict_step_s,
    work_for,
)
from wasi_nn_backend.llama.attention_probe import N_FREE, AttentionOption, AttentionWork, Samples
from wasi_nn_backend.llama.interface import AttentionChoice, ContextParams, KvLayout
from wasi_nn_backend.llama.kv_shape import KvShape

BOTH: tuple[KvLayout, ...] = ("streams", "unified")
STREAMS_OFF, STREAMS_ON = AttentionOption("streams", "off"), AttentionOption("streams", "on")
UNIFIED_OFF, UNIFIED_ON = AttentionOption("unified", "off"), AttentionOption("unified", "on")
ALL = (STREAMS_OFF, STREAMS_ON, UNIFIED_OFF, UNIFIED_ON)

SMOLLM2 = AttentionFacts(
    architecture="llama",
    kv_shape=KvShape((192,) * 30, (192,) * 30, 64, 64, 9),
    n_swa=0,
    n_params=135_000_000,
    n_weight_bytes=98_000_000,
    on_gpu=False,
    n_sequences_unified_max=254,
    n_cells_unified_max=2**31,
)
GEMMA = replace(SMOLLM2, architecture="gemma3", kv_shape=KvShape((256,) * 18, (256,) * 18, 256, 256, 4), n_swa=512)
PARAMS = ContextParams(n_ctx=2048, n_sequences=10, n_threads=2)

positive = st.floats(1e-6, 1e3)


@dataclass
class Machine:
    """Steps of one layer take ``milliseconds``, and ``fault`` is raised instead of measuring."""

    milliseconds: dict[AttentionOption, float] = field(
        default_factory=lambda: dict(zip(ALL, (1.0, 1.2, 1.2, 1.2), strict=True))
    )
    fault: Exception | None = None
    slow_share: float = 0.0  # of the steps that take ten times as long
    works: list[AttentionWork] = field(default_factory=list)

    def measure(self, work: AttentionWork, options: Sequence[AttentionOption], budget_s: float) -> Samples:
        assert budget_s == BUDGET_S
        self.works.append(work)
        if self.fault is not None:
            raise self.fault
        n_slow = round(20 * self.slow_share)
        return {
            option: [self.milliseconds[option] / 1e3] * (20 - n_slow) + [self.milliseconds[option] / 1e2] * n_slow
            for option in options
            if option in self.milliseconds
        }

    def environment(self, cache_path: Path | None = None, **changed: str | None) -> ProbeEnvironment:
        environment = ProbeEnvironment(None, "Milan", lambda: "abc", cache_path, self.measure)
        return replace(environment, **changed)  # type: ignore[arg-type]

    def choose(
        self,
        cache_path: Path | None = None,
        *,
        facts: AttentionFacts = SMOLLM2,
        params: ContextParams = PARAMS,
        layouts: Sequence[KvLayout] = BOTH,
    ) -> AttentionChoice:
        return choose(facts, params, layouts, self.environment(cache_path))


def chosen(choice: AttentionChoice) -> tuple[str, str]:
    return choice.kv_layout, choice.flash_attention


# -- times to a choice


@given(st.dictionaries(st.sampled_from(ALL), positive))
def test_what_is_chosen_is_the_rule_s_or_clearly_faster(steps_s: dict[AttentionOption, float]) -> None:
    option = decide(ALL, steps_s)
    if option is not STREAMS_OFF:
        assert steps_s[option] < (1 - MARGIN) * steps_s[STREAMS_OFF]
    if option.kv_layout == "unified":
        assert all(steps_s[option] < (1 - MARGIN) * steps_s.get(other, 1e9) for other in (STREAMS_OFF, STREAMS_ON))


@given(st.dictionaries(st.sampled_from(ALL), positive, min_size=4), st.floats(0.01, 100))
def test_only_proportions_count(steps_s: dict[AttentionOption, float], factor: float) -> None:
    best = decide(ALL, steps_s)
    others = [s for option, s in steps_s.items() if option is not best]
    if all(abs(steps_s[best] / ((1 - MARGIN) * other) - 1) > 1e-9 for other in others):  # no rounding at the margin
        assert decide(ALL, {option: seconds * factor for option, seconds in steps_s.items()}) is best


@pytest.mark.parametrize(
    ("off", "on", "unified_off", "unified_on", "expected"),
    [
        (73, 204, 296, 296, STREAMS_OFF),  # SmolLM2 with AMX, 16 sequences of 1,000 tokens
        (30, 24, 80, 60, STREAMS_ON),  # the same with 50 tokens
        (30, 28, 29, 27.5, STREAMS_OFF),  # a few percent are not worth it
        (30, 20, 19, 19, STREAMS_ON),  # nor are they between layouts
        (30, 28, 20, 26, UNIFIED_OFF),
    ],
)
def test_times_that_were_seen(
    off: float, on: float, unified_off: float, unified_on: float, expected: AttentionOption
) -> None:
    assert decide(ALL, dict(zip(ALL, (off, on, unified_off, unified_on), strict=True))) is expected


@pytest.mark.parametrize(
    ("n_ctx", "off_ms", "on_ms", "n_expected", "flash_attention"),
    [
        (768, 0.44, 0.49, 8, "on"),  # SmolLM2 without AMX
        (768, 0.44, 0.49, 1, "off"),
        (1024, 0.44, 0.55, 2, "on"),
        (1025, 0.44, 0.49, 2, "off"),
        (768, 0.44, 0.88, 8, "off"),
        (1280, 0.44, 0.49, 8, "off"),
        (2048, 0.44, 0.40, 8, "on"),
        (2048, 0.44, 0.40, 1, "off"),  # its steps would no longer adapt to a busy machine
        (2048, 0.44, 0.10, 1, "on"),
    ],
)
def test_small_windows_of_several_sequences_have_flash_attention_unless_it_is_clearly_slower(
    n_ctx: int, off_ms: float, on_ms: float, n_expected: int, flash_attention: str
) -> None:
    machine = Machine({STREAMS_OFF: off_ms, STREAMS_ON: on_ms})
    params = replace(PARAMS, n_ctx=n_ctx, n_sequences=8, n_sequences_expected=n_expected)
    assert machine.choose(params=params, layouts=("streams",)).flash_attention == flash_attention


@pytest.mark.parametrize("milliseconds", [{}, {STREAMS_OFF: 0.44}])
def test_without_a_measurement_of_it_small_windows_have_no_flash_attention(
    milliseconds: dict[AttentionOption, float],
) -> None:
    params = replace(PARAMS, n_ctx=768, n_sequences_expected=8)
    machine = Machine(milliseconds, fault=None if milliseconds else RuntimeFailure("no room"))
    assert chosen(machine.choose(params=params)) == ("streams", "off")


def test_cells_that_are_computed_in_vain_count() -> None:
    """Without flash attention whole blocks: 256, 512 or 768 in a window of 768, in which 384 tokens are on average."""
    params = replace(PARAMS, n_ctx=768)
    work = work_for(SMOLLM2, params)
    assert work is not None
    free = replace(SMOLLM2, n_params=0, n_weight_bytes=0)
    measured_s = 1e-3
    steps_s = predict_step_s(free, params, work, {STREAMS_OFF: measured_s, STREAMS_ON: measured_s})
    assert steps_s[STREAMS_OFF] == pytest.approx(30 * measured_s * 512 / 512)
    assert steps_s[STREAMS_ON] == pytest.approx(30 * measured_s * 384 / (work.n_tokens + N_FREE / 2))


@given(off=positive, on=positive, n_ctx=st.integers(128, 1 << 20))
def test_a_model_that_takes_long_for_the_rest_is_not_ruled_by_its_attention(off: float, on: float, n_ctx: int) -> None:
    params = replace(PARAMS, n_ctx=n_ctx)
    work = work_for(SMOLLM2, params)
    assert work is not None
    large = replace(SMOLLM2, n_params=10**15)
    steps_s = predict_step_s(large, params, work, {STREAMS_OFF: off / 1e4, STREAMS_ON: on / 1e4})
    assert decide((STREAMS_OFF, STREAMS_ON), steps_s) is STREAMS_OFF


def test_a_sliding_window_spares_flash_attention_what_lies_outside() -> None:
    """Equal times for 500 tokens are no longer equal for 2,000, of which most layers see the last 512."""
    params = replace(PARAMS, n_ctx=4096)
    choices = [Machine().choose(facts=facts, params=params) for facts in (replace(GEMMA, n_swa=0), GEMMA)]
    assert [chosen(choice) for choice in choices] == [("streams", "off"), ("streams", "on")]


# -- what is open


@pytest.mark.parametrize(
    ("params", "layouts", "expected"),
    [
        (PARAMS, BOTH, ALL),
        (PARAMS, ("streams",), (STREAMS_OFF, STREAMS_ON)),
        (PARAMS, ("unified",), (UNIFIED_OFF, UNIFIED_ON)),
        (replace(PARAMS, flash_attention="off"), BOTH, (STREAMS_OFF, UNIFIED_OFF)),
        (replace(PARAMS, flash_attention="on"), BOTH, (STREAMS_ON, UNIFIED_ON)),
        (replace(PARAMS, cache_type_v="q8_0"), BOTH, (STREAMS_ON, UNIFIED_ON)),
        (replace(PARAMS, cache_type_k="q8_0"), ("streams",), (STREAMS_OFF, STREAMS_ON)),
        (replace(PARAMS, n_ctx=257), ("streams",), (STREAMS_OFF, STREAMS_ON)),
        (replace(PARAMS, n_ctx=256), ("streams",), (STREAMS_ON, STREAMS_OFF)),
        (replace(PARAMS, n_ctx=256), BOTH, (STREAMS_ON, STREAMS_OFF, UNIFIED_OFF, UNIFIED_ON)),
        (replace(PARAMS, n_ctx=64, n_sequences=4), BOTH, (STREAMS_ON, STREAMS_OFF, UNIFIED_ON, UNIFIED_OFF)),
        (replace(PARAMS, n_ctx=256, flash_attention="off"), ("streams",), (STREAMS_OFF,)),
    ],
)
def test_what_the_caller_leaves_open(
    params: ContextParams, layouts: tuple[KvLayout, ...], expected: tuple[AttentionOption, ...]
) -> None:
    assert options_for(SMOLLM2, params, layouts) == expected


@pytest.mark.parametrize(
    "facts",
    [
        replace(SMOLLM2, architecture="grok"),
        replace(SMOLLM2, kv_shape=replace(SMOLLM2.kv_shape, n_embd_head_v=32)),
    ],
)
def test_models_that_llama_cpp_has_no_flash_attention_for(facts: AttentionFacts) -> None:
    assert options_for(facts, PARAMS, ("streams",)) == (STREAMS_OFF,)


def test_heads_that_blocks_of_a_quantised_cache_do_not_fit_have_no_flash_attention() -> None:
    facts = replace(SMOLLM2, kv_shape=KvShape((80,), (80,), 80, 80, 2))
    params = replace(PARAMS, cache_type_k="q8_0")
    assert options_for(facts, params, ("streams",)) == (STREAMS_OFF,)


@pytest.mark.parametrize(
    ("facts", "params"),
    [
        (SMOLLM2, replace(PARAMS, n_sequences=1)),
        (SMOLLM2, replace(PARAMS, n_sequences=255)),
        (replace(SMOLLM2, n_cells_unified_max=0), PARAMS),
        (replace(SMOLLM2, n_cells_unified_max=10 * 2048 - 1), PARAMS),
    ],
)
def test_the_unified_layout_is_not_tried_where_it_cannot_be(facts: AttentionFacts, params: ContextParams) -> None:
    machine = Machine(dict(zip(ALL, (9.0, 9.0, 1.0, 1.0), strict=True)))
    assert machine.choose(facts=facts, params=params).kv_layout == "streams"


@pytest.mark.parametrize(("n_cells", "layout"), [(2048, "unified"), (4095, "unified"), (4096, "streams")])
def test_where_memory_is_left_for_one_stream_the_sequences_share_it(n_cells: int, layout: KvLayout) -> None:
    machine = Machine(dict(zip(ALL, (1.0, 1.0, 9.0, 9.0), strict=True)))
    assert machine.choose(params=replace(PARAMS, n_cells=n_cells)).kv_layout == layout
    assert machine.choose(params=replace(PARAMS, n_cells=n_cells), layouts=("streams",)).kv_layout == "streams"


# -- what is measured


@given(
    n_kv_heads=st.integers(1, 64),
    n_group=st.integers(1, 16),
    n_embd_head=st.sampled_from([32, 64, 80, 96, 128, 256]),
    n_ctx=st.integers(128, 1 << 20),
    n_sequences=st.integers(1, 256),
)
def test_work_keeps_the_proportion_of_heads_and_is_bounded(
    n_kv_heads: int, n_group: int, n_embd_head: int, n_ctx: int, n_sequences: int
) -> None:
    n_values = n_kv_heads * n_embd_head
    facts = replace(SMOLLM2, kv_shape=KvShape((n_values,), (n_values,), n_embd_head, n_embd_head, n_kv_heads * n_group))
    work = work_for(facts, replace(PARAMS, n_ctx=n_ctx, n_sequences=n_sequences))
    assert work is not None
    assert work.n_heads == n_group * work.n_kv_heads
    assert n_kv_heads % work.n_kv_heads == 0
    assert work.n_heads * n_embd_head <= 1024 or work.n_kv_heads == 1
    assert work.n_tokens > 0
    assert work.n_tokens + N_FREE <= min(n_ctx, 512)
    assert work.n_sequences in (1, 2, 4, 8)


@pytest.mark.parametrize(
    "kv_shape",
    [
        KvShape((0, 0), (0, 0), 64, 64, 9),  # no attention
        KvShape((192,), (192,), 64, 64, 10),  # heads that keys cannot be shared among
        KvShape((192,), (96,), 64, 32, 9),
        KvShape((21,), (21,), 7, 7, 9),
    ],
)
def test_attention_that_the_stand_in_does_not_have_follows_the_rule(kv_shape: KvShape) -> None:
    machine = Machine(dict(zip(ALL, (9.0, 1.0, 1.0, 1.0), strict=True)))
    choice = machine.choose(facts=replace(SMOLLM2, kv_shape=kv_shape))
    assert chosen(choice) == ("streams", "off")
    assert "the rule" in choice.reason
    assert not machine.works


@pytest.mark.parametrize(
    ("params", "layouts"),
    [
        (replace(PARAMS, flash_attention="on"), ("streams",)),
        (replace(PARAMS, flash_attention="off"), ("unified",)),
        (replace(PARAMS, cache_type_v="q4_0"), ("unified",)),
        (replace(PARAMS, flash_attention="off", n_sequences=1), BOTH),
    ],
)
def test_what_is_fixed_is_not_measured(params: ContextParams, layouts: tuple[KvLayout, ...]) -> None:
    machine = Machine()
    choice = machine.choose(params=params, layouts=layouts)
    assert choice.kv_layout == layouts[0]
    assert choice.flash_attention == (params.flash_attention if params.flash_attention != "auto" else "on")
    assert not machine.works


def test_on_a_gpu_llama_cpp_chooses() -> None:
    machine = Machine()
    assert chosen(machine.choose(facts=replace(SMOLLM2, on_gpu=True))) == ("streams", "auto")
    assert not machine.works


def test_the_reason_has_the_numbers() -> None:
    reason = Machine(dict(zip(ALL, (9.0, 1.0, 20.0, 20.0), strict=True))).choose().reason
    assert "streams with flash attention" in reason
    assert " ms" in reason


# -- what is kept


def test_a_machine_is_asked_once(tmp_path: Path) -> None:
    machine = Machine(dict(zip(ALL, (9.0, 1.0, 20.0, 20.0), strict=True)))
    path = tmp_path / "cache" / "attention.json"
    first, second = machine.choose(path), machine.choose(path)
    assert chosen(first) == chosen(second) == ("streams", "on")
    assert len(machine.works) == 1
    machine.choose(path, params=replace(PARAMS, n_ctx=1500))  # about the same window
    assert len(machine.works) == 1


@pytest.mark.parametrize(
    "change",
    [
        lambda e, p: (replace(e, cpu_name="Genoa"), p),
        lambda e, p: (replace(e, library_hash=lambda: "abd"), p),
        lambda e, p: (e, replace(p, n_threads=3)),
        lambda e, p: (e, replace(p, n_ctx=300)),
        lambda e, p: (e, replace(p, n_sequences=4)),
        lambda e, p: (e, replace(p, cache_type_k="q8_0")),
    ],
)
def test_another_machine_library_or_shape_is_measured_anew(tmp_path: Path, change) -> None:  # type: ignore[no-untyped-def]
    machine = Machine()
    environment = machine.environment(tmp_path / "attention.json")
    choose(SMOLLM2, PARAMS, BOTH, environment)
    changed_environment, params = change(environment, PARAMS)
    choose(SMOLLM2, params, BOTH, changed_environment)
    assert len(machine.works) == 2


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "null", "[" * 100_000, '{"version": 0, "entries": {}}', '{"version": 1, "entries": []}', b"\xff"],
)
def test_a_damaged_cache_is_replaced(tmp_path: Path, content: str | bytes) -> None:
    path = tmp_path / "attention.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    machine = Machine()
    for _ in range(2):
        assert chosen(machine.choose(path)) == ("streams", "off")
    assert len(machine.works) == 1


@pytest.mark.parametrize("value", [None, "fast", -1.0, 0.0, float("nan"), float("inf"), True, [1.0]])
def test_an_entry_that_is_no_time_is_measured_again(tmp_path: Path, value: object) -> None:
    path = tmp_path / "attention.json"
    machine = Machine()
    machine.choose(path)
    content = json.loads(path.read_text())
    for entry in content["entries"].values():
        entry[str(STREAMS_ON)] = value
    path.write_text(json.dumps(content))
    assert chosen(machine.choose(path)) == ("streams", "off")
    assert len(machine.works) == 2


def test_the_newest_measurements_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "attention.json"
    machine = Machine()
    for n_threads in range(1, 71):
        machine.choose(path, params=replace(PARAMS, n_threads=n_threads))
    assert len(json.loads(path.read_text())["entries"]) == 64
    machine.choose(path, params=replace(PARAMS, n_threads=70))
    assert len(machine.works) == 70
    machine.choose(path, params=replace(PARAMS, n_threads=1))
    assert len(machine.works) == 71


def test_a_cache_that_cannot_be_written_costs_a_measurement(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.touch()
    machine = Machine()
    for path in (blocked / "attention.json", None):
        assert chosen(machine.choose(path)) == ("streams", "off")
    assert len(machine.works) == 2


# -- what goes wrong


@pytest.mark.parametrize(
    "fault", [OSError(28, "No space left on device"), InvalidArgument("no memory"), RuntimeFailure("x")]
)
def test_a_measurement_that_fails_leaves_the_rule(tmp_path: Path, fault: Exception) -> None:
    machine = Machine(fault=fault)
    choice = machine.choose(tmp_path / "attention.json")
    assert chosen(choice) == ("streams", "off")
    assert str(fault) in choice.reason
    assert not (tmp_path / "attention.json").exists()


def test_what_was_disturbed_decides_nothing_and_is_not_kept(tmp_path: Path) -> None:
    machine = Machine(dict(zip(ALL, (9.0, 1.0, 20.0, 20.0), strict=True)), slow_share=0.6)
    choice = machine.choose(tmp_path / "attention.json")
    assert chosen(choice) == ("streams", "off")
    assert "disturbed" in choice.reason
    machine.slow_share = 0.3
    assert chosen(machine.choose(tmp_path / "attention.json")) == ("streams", "on")


def test_one_that_lost_early_may_have_been_disturbed() -> None:
    calm, wild = [1.0] * 20, [1.0, 9.0, 9.0]
    assert not is_disturbed({STREAMS_OFF: calm, STREAMS_ON: calm, UNIFIED_OFF: wild})
    assert is_disturbed({STREAMS_OFF: calm, STREAMS_ON: [1.0] * 9 + [2.0] * 11})


def test_options_that_there_was_no_time_for_are_not_chosen(tmp_path: Path) -> None:
    machine = Machine({STREAMS_OFF: 9.0})
    for _ in range(2):
        assert chosen(machine.choose(tmp_path / "attention.json")) == ("streams", "off")
    assert len(machine.works) == 1


@pytest.mark.parametrize("override", ["0", "1"])
def test_the_environment_can_forbid_the_measurement(override: str) -> None:
    machine = Machine(dict(zip(ALL, (9.0, 1.0, 20.0, 20.0), strict=True)))
    choice = choose(SMOLLM2, PARAMS, BOTH, machine.environment(override=override))
    assert chosen(choice) == ("streams", "off" if override == "0" else "on")
    assert len(machine.works) == int(override)


def test_another_value_in_the_environment_is_an_error() -> None:
    with pytest.raises(InvalidArgument, match="WASI_NN_ATTENTION_PROBE"):
        choose(SMOLLM2, PARAMS, BOTH, Machine().environment(override="yes"))
