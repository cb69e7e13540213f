"""``wasi-nn generate`` on llama.cpp."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
from pathlib import Path

import pytest

from tests.cli.conftest import Command, command_line
from wasi_nn_backend.cli import generate, main

GREEDY = ["--temperature", 0, "--config", "ignore_eos=true"]


def test_the_text_does_not_depend_on_how_it_is_asked_for(wasi_nn_here: Command, tiny_model_path: Path) -> None:
    arguments = ["generate", "--model", tiny_model_path, *GREEDY, "--max-tokens", 12]
    streamed = wasi_nn_here(*arguments, "Hello")
    assert (streamed.returncode, streamed.stderr) == (0, "")
    assert wasi_nn_here(*arguments, "-", stdin="Hello\n").stdout == streamed.stdout
    answer = json.loads(wasi_nn_here(*arguments, "--json", "Hello").stdout)
    assert streamed.stdout in (answer["text"], answer["text"] + "\n")
    assert answer["metadata"]["output_tokens"] == 12


def test_statistics_go_to_stderr(wasi_nn_here: Command, tiny_model_path: Path) -> None:
    done = wasi_nn_here("generate", "-m", tiny_model_path, *GREEDY, "--max-tokens", 5, "--stats", "Hello")
    assert done.returncode == 0
    assert "5 answer tokens" in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("option", "value", "section"),
    [
        ("--temperature", 0.5, "sampling.temperature"),
        ("--top-k", 3, "sampling.top_k"),
        ("--top-p", 0.5, "sampling.top_p"),
        ("--min-p", 0.5, "sampling.min_p"),
        ("--seed", 7, "sampling.seed"),
        ("--max-tokens", 3, "stopping.max_tokens"),
        ("--system", "Be brief.", "session.system_prompt"),
    ],
)
def test_an_option_is_the_same_as_its_key(
    wasi_nn_here: Command, tiny_model_path: Path, option: str, value: object, section: str
) -> None:
    common = ["generate", "-m", tiny_model_path, "--config", "ignore_eos=true", "--config", "max_tokens=12"]
    seed = [] if option == "--seed" else ["--seed", 5]
    by_option = wasi_nn_here(*common, *seed, option, value, "Hello")
    by_key = wasi_nn_here(*common, *seed, "--config", f"{section}={value}", "Hello")
    assert by_option.returncode == by_key.returncode == 0
    assert by_option.stdout == by_key.stdout


def test_a_stop_string_ends_the_answer_before_it(wasi_nn_here: Command, tiny_model_path: Path) -> None:
    arguments = ["generate", "-m", tiny_model_path, *GREEDY, "--max-tokens", 24, "--json"]
    whole = json.loads(wasi_nn_here(*arguments, "Hello").stdout)["text"]
    stop = whole[len(whole) // 2 :][:2]
    cut = json.loads(wasi_nn_here(*arguments, "--stop", stop, "--stop", "never in it", "Hello").stdout)
    assert cut["text"] == whole[: whole.index(stop)]
    assert cut["metadata"]["finish_reason"] == "stop_string"


def test_a_raw_prompt_has_no_template_around_it(wasi_nn_here: Command, tiny_model_path: Path) -> None:
    arguments = ["generate", "-m", tiny_model_path, *GREEDY, "--max-tokens", 1, "--json"]
    in_a_chat = json.loads(wasi_nn_here(*arguments, "Hello").stdout)["metadata"]["input_tokens"]
    raw = json.loads(wasi_nn_here(*arguments, "--raw", "Hello").stdout)["metadata"]["input_tokens"]
    raw_line = json.loads(wasi_nn_here(*arguments, "--raw", "-", stdin="Hello\n").stdout)["metadata"]["input_tokens"]
    assert raw < raw_line < in_a_chat


@pytest.mark.parametrize(("arguments", "n_sequences"), [([], 1), (["--config", "max_concurrent=3"], 3)])
def test_memory_is_reserved_for_one_sequence(
    wasi_nn_here: Command, tiny_model_path: Path, arguments: list[str], n_sequences: int
) -> None:
    """llama.cpp writes the whole KV memory when it is made: nine unused windows would cost time and gigabytes."""
    for command in ("generate", "chat"):
        options = [command, "-m", tiny_model_path, "--max-tokens", 1, *arguments]
        done = wasi_nn_here("--log-level", "debug", *options, *(["x"] if command == "generate" else []))
        assert done.returncode == 0
        assert re.findall(r"n_seq_max += (\d+)", done.stderr) == [str(n_sequences)]


def test_errors_are_one_line(wasi_nn_here: Command, tiny_model_path: Path, tmp_path: Path) -> None:
    (tmp_path / "text.gguf").write_text("no model")
    long_prompt = ["generate", "-m", tiny_model_path, "--config", "n_ctx=128", "-"]
    for arguments, stdin, code in (
        (["generate", "-m", "./gone.gguf", "x"], "", "model_not_found"),
        (["generate", "-m", "gone", "x"], "", "not_found"),
        (["generate", "-m", "text.gguf", "x"], "", "invalid_argument"),
        (long_prompt, "word " * 2000, "prompt_too_long"),
    ):
        done = wasi_nn_here(*arguments, stdin=stdin)
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr.startswith("error: ")
        assert done.stderr.endswith(f"(code {code})\n")
        assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ([""], "PROMPT"),
        (["--config", "settings.json", "x"], "--config: 'settings.json' is no assignment; write key=value or @FILE"),
        (["--config", "@", "x"], "no file name"),
        (["--temperature", "3", "x"], "--temperature"),
        (["--max-tokens", "0", "x"], "max_tokens"),
        (["--config", "n_ctx", "x"], "--config"),
        (["--config", "n_ctx=many", "x"], "--config: n_ctx"),
        (["--raw", "--system", "s", "x"], "--system"),
    ],
)
def test_usage_errors_name_the_option(arguments: list[str], complaint: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "--model", "smollm2", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert complaint in captured.err.splitlines()[0]


@pytest.mark.parametrize(("stdin", "complaint"), [("", "stdin had no text"), ("twelve bytes", "more than 11 bytes")])
def test_stdin_that_is_no_prompt(
    wasi_nn_here: Command, monkeypatch: pytest.MonkeyPatch, stdin: str, complaint: str
) -> None:
    monkeypatch.setattr(generate, "PROMPT_BYTES_MAX", 11)
    done = wasi_nn_here("generate", "-m", "smollm2", "-", stdin=stdin)
    assert (done.returncode, done.stdout) == (2, "")
    assert complaint in done.stderr


def test_ctrl_c_keeps_the_text_so_far(tiny_model_path: Path) -> None:
    # Far longer than it takes to read one byte; llama.cpp warns of a context beyond the model's own.
    endless = [*GREEDY, "--config", "n_ctx=30000", "--max-tokens", 29000]
    arguments = ["--log-level", "error", "generate", "-m", tiny_model_path, *endless, "Hello"]
    with subprocess.Popen(command_line(*arguments), stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        first = process.stdout.read(1)
        process.send_signal(signal.SIGINT)
        rest, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors == b""
    assert first
    assert rest.endswith(b"\n")


def test_a_reader_that_leaves_ends_it_quietly(tiny_model_path: Path, closed_pipe: int) -> None:
    arguments = ["generate", "-m", tiny_model_path, *GREEDY, "--max-tokens", 20, "Hello"]
    done = subprocess.run(command_line(*arguments), stdout=closed_pipe, stderr=subprocess.PIPE, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (141, b"")


@pytest.mark.real
def test_smollm2_knows_the_capital_of_france(wasi_nn: Command, smollm2_path: Path) -> None:
    question = "Name the capital city of France."
    for model in ("smollm2", smollm2_path):
        done = wasi_nn("generate", "--model", model, "--temperature", 0, question)
        assert (done.returncode, done.stderr) == (0, "")
        assert "Paris" in done.stdout


@pytest.mark.real
def test_ctrl_c_while_the_model_loads(smollm2_path: Path) -> None:
    terminal, terminal_end = os.openpty()
    arguments = command_line("generate", "-m", smollm2_path, "--max-tokens", 2000, "Count to a thousand.")
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=terminal_end) as process:
        os.close(terminal_end)
        shown = b""
        while b"Loading" not in shown:
            shown += os.read(terminal, 4096)
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)
    os.close(terminal)
    assert process.returncode == 130
    assert b"Traceback" not in shown
