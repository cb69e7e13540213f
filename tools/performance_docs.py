"""Write docs/performance.md and its plots out of a recorded benchmark, and what the documents say about its form.

    wasi-nn bench --out results && python tools/performance_docs.py results/report.json

Without an argument the record that is there, docs/performance/recorded.json, is written anew.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

from wasi_nn_backend.bench import document as form
from wasi_nn_backend.bench.document import Document, Target
from wasi_nn_backend.bench.plots import plot_scenario
from wasi_nn_backend.bench.report import conditions, n_lines, notes, scenario_section, target_table
from wasi_nn_backend.bench.scenario import SCENARIOS, load_scenario

DOCS = Path(__file__).resolve().parents[1] / "docs"
PAGE = DOCS / "performance.md"
FOLDER = DOCS / "performance"
RECORD = FOLDER / "recorded.json"
SCHEMA = FOLDER / f"form-{form.FORM}.json"
BENCHMARKS = DOCS / "benchmarks.md"

#: The table of columns stands between two comments that no reader sees.
_COLUMNS = re.compile(r"(<!-- columns -->\n).*?(<!-- end -->)", re.DOTALL)

_INTRODUCTION = """\
# Performance

<!-- Made by tools/performance_docs.py from docs/performance/recorded.json: record anew instead of changing it here. -->

One run of `wasi-nn bench`, as it was measured. Speeds are this machine's; ratios compare what took turns in the same
run, and carry over better. [benchmarks.md](benchmarks.md) says how to run it on yours, and
[performance/recorded.json](performance/recorded.json) has every round."""

_METHOD = """\
## Method

- What is compared is measured in the same run, in turns, and as the median of each round's ratios: a machine's speed
  drifts by more than most differences.
- Each scenario runs in a process of its own. Before and after each, a thread per core computes for half a second: what
  they get of the cores says whether something else was running.
- Every contender gets what serves it best. The plain loop, one `llama_decode` and an argmax a sequence, has for each
  line the fastest of streams or one unified cache, flash attention on or off, one thread or all. The engine has its
  automatic settings.
- Peers run as their wheels from PyPI or, where there is none, as pip compiles them."""

_LIMITS = """\
What these figures do not say:

- The model is small. Larger ones spend a larger part of each step in `llama_decode`, where this package changes
  nothing: the engine's share falls, and so does what batching gains on the same machine.
- xllamacpp's wheel is compiled without AVX-512 and AMX. A part of the distance is the compiler's.
- llama-cpp-python's class runs one sequence at a time, so one session stands for all; that its sessions would have to
  compute their prompts again at each turn is left out.
- Prompts are words drawn at random and texts are greedy: nothing is known about speculative decoding or grammars.
- CPU only, and few cores: GPUs and machines with many cores are another measurement."""


def page(document: Document) -> str:
    targets = [target for result in document.scenarios for target in result.targets]
    parts = [
        _INTRODUCTION,
        conditions(document),
        "\n".join(f"- **note**: {note}" for note in notes(document)),
        *(["## Targets", target_table(targets)] if targets else []),
        "## Weak spots",
        weak_spots(document),
        _LIMITS,
        _METHOD,
        *(
            f"## {result.title}\n\n{scenario_section(result, plot_folder='performance/')}"
            for result in document.scenarios
        ),
    ]
    return "\n\n".join(filter(None, parts)) + "\n"


def weak_spots(document: Document) -> str:
    """What was missed, what was left out, and what came closest to its bound."""
    lines = []
    for result in document.scenarios:
        if result.status != "done":
            lines.append(f"{result.title}: {result.status} after {n_lines(result)}.")
        for target in result.targets:
            if target.is_met is False:
                lines.append(f"{result.title}: {_sentence(target)}.")
    met = [target for result in document.scenarios for target in result.targets if target.is_met]
    if met:
        lines.append(f"Of what was met, the closest to its bound: {_sentence(min(met, key=_margin))}.")
    return "\n".join(f"- {line}" for line in lines)


def _sentence(target: Target) -> str:
    return f"{target.name} is {target.value:{target.format}}, and is to be {target.relation} {target.bound:g}"


def _margin(target: Target) -> float:
    """1 is at the bound; more is better."""
    is_floor = target.relation in ("at least", "above")
    above, below = (target.value, target.bound) if is_floor else (target.bound, target.value)
    return above / below if below > 0 else float("inf")


def schema() -> str:
    return json.dumps(Document.model_json_schema(), indent=2) + "\n"


def with_columns(text: str) -> str:
    """docs/benchmarks.md with its table of each scenario's columns as it has to be."""
    lines = ["| scenario | value of a row | what it is |", "| --- | --- | --- |"]
    for name, module in SCENARIOS.items():
        lines += [f"| {name} | `{column.key}` | {column.meaning} |" for column in load_scenario(module).columns]
    return _COLUMNS.sub(lambda match: match[1] + "\n" + "\n".join(lines) + "\n\n" + match[2], text)


def main() -> None:
    document = form.read(Path(sys.argv[1]) if len(sys.argv) > 1 else RECORD)
    FOLDER.mkdir(exist_ok=True)
    for result in document.scenarios:
        result.plots = plot_scenario(load_scenario(SCENARIOS[result.name]), result, document, FOLDER, ["svg"])
    form.write(document, RECORD)
    PAGE.write_text(page(document), encoding="utf-8")
    SCHEMA.write_text(schema(), encoding="utf-8")
    BENCHMARKS.write_text(with_columns(BENCHMARKS.read_text(encoding="utf-8")), encoding="utf-8")
    print(f"written: {PAGE}, {FOLDER}, {BENCHMARKS}")


if __name__ == "__main__":
    main()
