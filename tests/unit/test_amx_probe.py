"""The decision about AMX on machines that do not exist here, and the probe's child on the one that does."""

from __future__ import annotations

import itertools
import json
import math
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wasi_nn_backend.errors import InvalidArgument
from wasi_nn_backend.llama import amx_probe
from wasi_nn_backend.llama.amx_probe import ChildOutcome, ChildResult, Cpu, ProbeEnvironment, decide, run_child

AMX_BUILD = "CPU : AVX512 = 1 | AMX_INT8 = 1 | REPACK = 1"
PLAIN_BUILD = "CPU : AVX512 = 1 | REPACK = 1"
AMX_CPU = Cpu("Sapphire", frozenset({"avx512f", "amx_tile", "amx_int8"}))
PLAIN_CPU = Cpu("Milan", frozenset({"avx2"}))

AGREES = ChildResult(ChildOutcome.FINISHED, 0.012)
DISAGREES = ChildResult(ChildOutcome.FINISHED, 0.9)
CRASHES = ChildResult(ChildOutcome.CRASHED, detail="it died of SIGSEGV")
TIMES_OUT = ChildResult(ChildOutcome.TIMED_OUT, detail="no answer")
NOT_RUN = ChildResult(ChildOutcome.NOT_RUN, detail="no Python")


@dataclass
class Child:
    result: ChildResult
    n_runs: int = field(default=0)

    def __call__(self) -> ChildResult:
        self.n_runs += 1
        return self.result


def environment(child: Child, cache_path: Path | None = None) -> ProbeEnvironment:
    return ProbeEnvironment(
        system_info=AMX_BUILD,
        cpu=AMX_CPU,
        override=None,
        library_hash=lambda: "abc",
        cache_path=cache_path,
        run_child=child,
    )


@pytest.mark.parametrize(
    ("result", "works"),
    [(AGREES, True), (DISAGREES, False), (CRASHES, False), (TIMES_OUT, False), (NOT_RUN, False)],
)
def test_amx_is_used_only_when_the_child_agrees(result: ChildResult, works: bool) -> None:
    verdict = decide(environment(Child(result)))
    assert verdict.use_extra_buffers is works
    assert (verdict.warning is None) is works


@given(st.floats(allow_nan=True, allow_infinity=True))
def test_no_number_but_a_small_one_passes(relative_error: float) -> None:
    verdict = decide(environment(Child(ChildResult(ChildOutcome.FINISHED, relative_error))))
    assert verdict.use_extra_buffers == (not math.isnan(relative_error) and relative_error <= 0.1)


def test_the_warning_has_the_line_that_rebuilds() -> None:
    warning = decide(environment(Child(CRASHES))).warning or ""
    assert (
        "CMAKE_ARGS=\"-DCMAKE_C_FLAGS='-fno-tree-dse -fno-dse' -DCMAKE_CXX_FLAGS='-fno-tree-dse -fno-dse'\" pip "
        "install --force-reinstall --no-cache-dir --no-binary llama-cpp-python llama-cpp-python==0.3.36"
    ) in warning
    assert "SIGSEGV" in warning


@pytest.mark.parametrize(
    "changed",
    [{"system_info": PLAIN_BUILD}, {"cpu": PLAIN_CPU}, {"override": "0"}, {"override": "1"}],
    ids=["build without AMX", "CPU without AMX", "override 0", "override 1"],
)
def test_nothing_is_probed_without_need(changed: dict[str, object]) -> None:
    child = Child(CRASHES)
    verdict = decide(replace(environment(child), **changed))  # type: ignore[arg-type]
    assert child.n_runs == 0
    assert verdict.use_extra_buffers == (changed.get("override") != "0")
    assert verdict.warning is None


def test_a_cpu_that_lists_no_flags_is_probed() -> None:
    child = Child(AGREES)
    decide(replace(environment(child), cpu=Cpu("unknown", None)))
    assert child.n_runs == 1


def test_an_override_that_is_neither_is_named() -> None:
    with pytest.raises(InvalidArgument, match="WASI_NN_AMX"):
        decide(replace(environment(Child(AGREES)), override="yes"))


@pytest.mark.parametrize("result", [AGREES, DISAGREES, CRASHES])
def test_a_verdict_about_the_library_is_kept(tmp_path: Path, result: ChildResult) -> None:
    child = Child(result)
    cache = tmp_path / "deep" / "amx.json"
    verdicts = [decide(environment(child, cache)) for _ in range(3)]
    assert child.n_runs == 1
    assert len({verdict.use_extra_buffers for verdict in verdicts}) == 1
    assert len({verdict.warning is None for verdict in verdicts}) == 1


@pytest.mark.parametrize("result", [TIMES_OUT, NOT_RUN])
def test_an_accident_is_not_kept(tmp_path: Path, result: ChildResult) -> None:
    child = Child(result)
    cache = tmp_path / "amx.json"
    decide(environment(child, cache))
    child.result = AGREES
    assert decide(environment(child, cache)).use_extra_buffers
    assert child.n_runs == 2


@pytest.mark.parametrize("changed", [{"library_hash": lambda: "other"}, {"cpu": replace(AMX_CPU, name="Granite")}])
def test_another_library_or_cpu_is_probed_again(tmp_path: Path, changed: dict[str, object]) -> None:
    child, cache = Child(CRASHES), tmp_path / "amx.json"
    decide(environment(child, cache))
    decide(replace(environment(child, cache), **changed))  # type: ignore[arg-type]
    assert child.n_runs == 2


@pytest.mark.parametrize("content", ["", "[]", "{", '"x"', '{"abc Sapphire": "yes"}', "null", "\x00"])
def test_a_damaged_cache_is_probed_over(tmp_path: Path, content: str) -> None:
    child, cache = Child(AGREES), tmp_path / "amx.json"
    cache.write_text(content)
    assert decide(environment(child, cache)).use_extra_buffers
    assert child.n_runs == 1
    assert json.loads(cache.read_text()) == {"abc Sapphire": True}


def test_a_cache_that_cannot_be_written_does_no_harm(tmp_path: Path) -> None:
    child = Child(AGREES)
    (tmp_path / "file").touch()
    for _ in range(2):
        assert decide(environment(child, tmp_path / "file" / "amx.json")).use_extra_buffers
    assert child.n_runs == 2


def test_the_cache_lies_where_the_user_wants_it(tmp_path: Path) -> None:
    path = amx_probe.default_cache_path({"XDG_CACHE_HOME": str(tmp_path)})
    assert path is not None
    assert path.is_relative_to(tmp_path)
    for environ in ({}, {"XDG_CACHE_HOME": ""}, {"XDG_CACHE_HOME": "relative"}):
        assert amx_probe.default_cache_path(environ) == Path.home() / ".cache" / "wasi-nn-backend" / "amx.json"


def test_the_hash_sees_every_file(tmp_path: Path) -> None:
    files = [tmp_path / name for name in ("a.so", "b.so")]
    hashes = set()
    for content in itertools.product((b"1", b"2"), repeat=2):
        for file, data in zip(files, content, strict=True):
            file.write_bytes(data)
        hashes.add(amx_probe.hash_files(files))
    assert len(hashes) == 4


def test_the_cpu_is_read(tmp_path: Path) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(
        "processor\t: 0\nmodel name\t: Some CPU @ 2 GHz\nflags\t\t: fpu amx_tile amx_int8\n\nprocessor: 1\n"
    )
    assert amx_probe.read_cpu(cpuinfo) == Cpu("Some CPU @ 2 GHz", frozenset({"fpu", "amx_tile", "amx_int8"}))
    assert amx_probe.read_cpu(tmp_path / "none") == Cpu("unknown", None)


class TestRunChild:
    """Real children, made of one line each."""

    @pytest.fixture
    def module(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
        return tmp_path / "probe_stub.py"

    def test_one_that_crashes(self, module: Path) -> None:
        module.write_text("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)")
        result = run_child(module="probe_stub")
        assert result.outcome is ChildOutcome.CRASHED
        assert "SIGSEGV" in result.detail

    def test_one_that_is_killed_says_nothing_about_the_library(self, module: Path) -> None:
        module.write_text("import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
        assert run_child(module="probe_stub").outcome is ChildOutcome.NOT_RUN

    def test_one_that_hangs(self, module: Path) -> None:
        module.write_text("import threading; threading.Event().wait()")
        assert run_child(timeout_s=0.2, module="probe_stub").outcome is ChildOutcome.TIMED_OUT

    def test_one_that_fails_is_quoted(self, module: Path) -> None:
        module.write_text("raise RuntimeError('no such luck')")
        result = run_child(module="probe_stub")
        assert result.outcome is ChildOutcome.NOT_RUN
        assert "no such luck" in result.detail

    def test_one_that_answers(self, module: Path) -> None:
        module.write_text(
            "import sys, pathlib; pathlib.Path(sys.argv[1], 'result.json').write_text('{\"relative_error\": 0.5}')"
        )
        assert run_child(module="probe_stub") == ChildResult(ChildOutcome.FINISHED, 0.5)

    @pytest.mark.parametrize("executable", ["", "/usr/bin/iwasm", "/nowhere/python3"])
    def test_an_embedding_program_is_not_started(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, executable: str
    ) -> None:
        monkeypatch.setattr(sys, "executable", executable)
        monkeypatch.setattr(sys, "prefix", str(tmp_path))
        assert run_child().outcome is ChildOutcome.NOT_RUN

    def test_a_frozen_program_is_not_started(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(sys, "frozen", True, raising=False)
        assert run_child().outcome is ChildOutcome.NOT_RUN

    def test_an_embedded_python_finds_the_one_of_its_environment(
        self, module: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        module.write_text("raise SystemExit(3)")
        monkeypatch.setattr(sys, "executable", "/usr/bin/iwasm")
        assert "ended with 3" in run_child(module="probe_stub").detail

    def test_the_real_one_compares_this_machine_s_kernels(self) -> None:
        """Without AMX the extra buffers hold repacked weights: other kernels too, which must agree as well."""
        result = run_child()
        assert result.outcome is ChildOutcome.FINISHED, result.detail
        assert result.relative_error is not None
        assert result.relative_error <= amx_probe.MAX_RELATIVE_ERROR
