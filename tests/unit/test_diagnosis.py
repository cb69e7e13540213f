"""Each cause that ``wasi-nn doctor`` knows, on machines that do not exist here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.lora import write_adapter
from wasi_nn_backend.config import parse_layer, resolve
from wasi_nn_backend.diagnosis import Finding, Machine, Status, Subject, diagnose
from wasi_nn_backend.errors import RuntimeFailure
from wasi_nn_backend.llama.amx_probe import Cpu
from wasi_nn_backend.llama.build_report import BuildReport, Device, ask_child

GIB = 1 << 30
BUILD = BuildReport(
    version="0.3.36",
    commit="abc",
    system_info="CPU : AVX2 = 1 | FMA = 1 | F16C = 1 | OPENMP = 1",
    supports_gpu_offload=False,
    devices=(Device("CPU", "a CPU"),),
    amx_reason="the CPU has no AMX",
    amx_warning="",
)
FLAGS = frozenset({"avx2", "fma", "f16c"})
MACHINE = Machine(
    environ={},
    find_program=lambda name: f"/usr/bin/{name}",
    build_report=lambda: BUILD,
    cpu=lambda: Cpu("a CPU", FLAGS),
    n_cores=lambda: 4,
    n_bytes_available=lambda: 8 * GIB,
)


def subject(model: Path | None = None, **values: Any) -> Subject:
    return Subject(resolve([parse_layer(values, name="test", unknown="error")]), model)


def problems(machine: Machine, of: Subject) -> list[Finding]:
    return [finding for finding in diagnose(machine, of) if finding.status is Status.PROBLEM]


def dies() -> BuildReport:
    raise RuntimeFailure("llama.cpp dies of SIGILL when it is loaded")


def test_a_good_machine_has_no_problem(tiny_model_path: Path, tmp_path: Path) -> None:
    write_adapter(tmp_path / "adapter.gguf")
    values = {
        "lora": str(tmp_path / "adapter.gguf"),
        "cache_type_v": "q8_0",
        "logging": {"file": str(tmp_path / "log")},
    }
    findings = diagnose(MACHINE, subject(tiny_model_path, **values))
    assert {finding.status for finding in findings} == {Status.OK}
    assert not (tmp_path / "log").exists()


def of_amx(reason: str, warning: str) -> Machine:
    build = replace(BUILD, amx_reason=reason, amx_warning=warning)
    return replace(MACHINE, cpu=lambda: Cpu("Xeon", FLAGS | {"amx_int8"}), build_report=lambda: build)


@pytest.mark.parametrize(
    ("machine", "values", "name", "words"),
    [
        (replace(MACHINE, find_program=lambda _name: None, build_report=dies), {}, "compiler", "apt-get install g++"),
        (replace(MACHINE, build_report=dies), {}, "llama.cpp", "SIGILL"),
        (of_amx("the probe crashed", "rebuild with CMAKE_ARGS"), {}, "AMX", "rebuild with CMAKE_ARGS"),
        (MACHINE, {"threads": 5}, "threads", "set model.threads to 4 or less"),
        (MACHINE, {"n_gpu_layers": 98}, "GPU", "cannot offload"),
        (replace(MACHINE, environ={"OMP_WAIT_POLICY": "ACTIVE"}), {}, "thread pool", "unset OMP_WAIT_POLICY"),
        (replace(MACHINE, environ={"GOMP_SPINCOUNT": "200000"}), {}, "thread pool", "unset OMP_WAIT_POLICY"),
        (replace(MACHINE, environ={"GOMP_SPINCOUNT": "infinite"}), {}, "thread pool", "unset OMP_WAIT_POLICY"),
        (replace(MACHINE, n_bytes_available=lambda: 2**26), {"n_ctx": 4096}, "memory", "are free"),
        (MACHINE, {"n_ctx": 10**6, "max_memory_mb": 64}, "memory", "max_memory_mb"),
        (MACHINE, {"cache_type_v": "q8_0", "flash_attention": "off"}, "memory", "needs flash attention"),
        (MACHINE, {"lora": "/nowhere/adapter.gguf"}, "LoRA", "/nowhere/adapter.gguf"),
        (MACHINE, {"lora": "~nobody-has-this-name/adapter.gguf"}, "LoRA", "home"),
        (MACHINE, {"logging": {"file": "/proc/nobody/writes/here"}}, "log", "cannot be written"),
    ],
)
def test_a_cause_is_named(
    tiny_model_path: Path, machine: Machine, values: dict[str, Any], name: str, words: str
) -> None:
    found = problems(machine, subject(tiny_model_path, **values))
    assert name in {finding.name for finding in found}
    assert any(words in f"{finding.detail} {finding.advice}" for finding in found if finding.name == name)
    assert all(finding.advice for finding in found)


def test_a_truncated_model_is_named(tiny_model_path: Path, tmp_path: Path) -> None:
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(tiny_model_path.read_bytes()[:-1000])
    (finding,) = problems(MACHINE, subject(cut))
    assert finding.name == "model"
    assert "beyond the end of the file" in finding.detail


@pytest.mark.parametrize(("has_c_libraries", "status"), [(True, Status.NOTE), (False, Status.PROBLEM)])
def test_a_compiler_matters_where_something_still_has_to_be_built(has_c_libraries: bool, status: Status) -> None:
    of = replace(subject(), has_c_libraries=has_c_libraries)
    findings = diagnose(replace(MACHINE, find_program=lambda _name: None), of)
    (compiler,) = [finding for finding in findings if finding.name == "compiler"]
    assert compiler.status is status
    assert compiler.advice


def test_amx_that_works_is_said_and_no_problem() -> None:
    findings = diagnose(of_amx("a trial run agreed", ""), subject())
    (amx,) = [finding for finding in findings if finding.name == "AMX"]
    assert amx.status is Status.OK
    assert "has AMX" in amx.detail


def test_features_of_the_cpu_that_the_build_lacks_are_a_note() -> None:
    machine = replace(MACHINE, cpu=lambda: Cpu("a CPU", FLAGS | {"avx512f"}))
    (llama,) = [finding for finding in diagnose(machine, subject()) if finding.name == "llama.cpp"]
    assert llama.status is Status.NOTE
    assert "AVX512" in llama.detail


def test_threads_that_spin_briefly_are_no_problem() -> None:
    machine = replace(MACHINE, environ={"OMP_WAIT_POLICY": "active", "GOMP_SPINCOUNT": "1000"})
    assert "thread pool" not in {finding.name for finding in problems(machine, subject())}


def test_a_gpu_is_named() -> None:
    build = replace(BUILD, supports_gpu_offload=True, devices=(*BUILD.devices, Device("Vulkan0", "llvmpipe")))
    findings = diagnose(replace(MACHINE, build_report=lambda: build), subject(n_gpu_layers=98))
    (gpu,) = [finding for finding in findings if finding.name == "GPU"]
    assert gpu.status is Status.OK
    assert "Vulkan0 (llvmpipe)" in gpu.detail


# -- the child


def test_the_installed_llama_cpp_reports_itself() -> None:
    report = ask_child()
    assert any(device.name == "CPU" for device in report.devices)
    assert report.features
    assert report.version


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("kill -ILL $$", "SIGILL.*built for another CPU"),
        ("kill -SEGV $$", "SIGSEGV"),
        ("echo no such library >&2; exit 1", "cannot be loaded: no such library"),
        ("exec sleep 1000", "did not load within"),
    ],
)
def test_a_library_that_kills_its_process_is_reported(
    tmp_path: Path, script: str, words: str, executable: Callable[[Path, str], Path]
) -> None:
    python = executable(tmp_path / "python", f"#!/bin/sh\n{script}\n")
    with pytest.raises(RuntimeFailure, match=words):
        ask_child(str(python), timeout_s=0.2 if "sleep" in script else 60)


def test_a_python_that_does_not_start_is_reported(tmp_path: Path) -> None:
    with pytest.raises(RuntimeFailure, match="no child process can be started"):
        ask_child(str(tmp_path / "missing"))


@pytest.fixture
def executable() -> Callable[[Path, str], Path]:
    def write(path: Path, text: str) -> Path:
        path.write_text(text)
        path.chmod(0o755)
        return path

    return write
