"""The form of a benchmark's JSON file. ``FORM`` is raised whenever a reader of the earlier form would stumble."""

from __future__ import annotations

import os
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from wasi_nn_backend.errors import InvalidArgument

__all__ = [
    "FORM",
    "Column",
    "Document",
    "Machine",
    "Model",
    "Row",
    "ScenarioResult",
    "Status",
    "Target",
    "Value",
    "read",
    "write",
]

FORM: Literal[1] = 1

Value = str | bool | int | float | None
Status = Literal["running", "done", "interrupted", "out of time", "failed"]
Relation = Literal["at least", "at most", "above", "below"]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Column(_Part):
    """One value of every row. ``heading`` "" keeps it out of the table."""

    key: str
    heading: str
    meaning: str = Field(description="What the value is, with its unit.")
    format: str = Field(default="", description="Python's format specification for a number.")

    def text(self, value: Value) -> str:
        """A value as the table shows it; what was not measured is a dash."""
        if value is None:
            return "-"
        if isinstance(value, bool):
            return "yes" if value else "no"
        return format(value, self.format) if isinstance(value, int | float) else str(value)


class Row(_Part):
    """``values`` has exactly the columns' keys; ``details`` is what they were made of, and free in form."""

    values: dict[str, Value]
    details: dict[str, Any] = Field(default_factory=dict)

    def number(self, key: str) -> float:
        """Raises ``InvalidArgument`` for a value that is none."""
        value = self.values[key]
        if not isinstance(value, int | float):
            raise InvalidArgument(f"{key} is {value!r} and no number")
        return value


class Target(_Part):
    """What a figure is to be. ``is_met`` is null where ``condition`` does not hold on this machine."""

    name: str
    value: float
    relation: Relation
    bound: float
    format: str = ".3f"
    condition: str = Field(default="", description="What the target presupposes; empty for nothing.")
    is_met: bool | None

    @classmethod
    def of(cls, name: str, value: float, relation: Relation, bound: float) -> Target:
        is_met = {
            "at least": value >= bound,
            "at most": value <= bound,
            "above": value > bound,
            "below": value < bound,
        }[relation]
        return cls(name=name, value=value, relation=relation, bound=bound, is_met=is_met)

    def under(self, condition: str, *, holds: bool) -> Target:
        return self.model_copy(update={"condition": condition, "is_met": self.is_met if holds else None})


class ScenarioResult(_Part):
    """``rows`` are as many as were measured, whatever the status."""

    name: str
    title: str
    shows: str
    method: str
    command: str = Field(description="Runs this scenario's measurement alone, with options of its own.")
    status: Status = "running"
    error: str = Field(default="", description="Why it failed, on which the last lines of its log follow.")
    duration_s: float = 0.0
    n_free_cores_before: float = Field(description="What a processor per core, computing for a moment, got of them.")
    n_free_cores_after: float | None = None
    columns: list[Column]
    rows: list[Row] = Field(default_factory=list)
    targets: list[Target] = Field(default_factory=list)
    plots: list[str] = Field(default_factory=list, description="Names of files beside this one.")


class Machine(_Part):
    cpu: str
    n_cores: int = Field(description="Cores that this process may use.")
    memory_bytes: int | None
    system: str
    llama_features: list[str] = Field(description="What llama.cpp's build uses of the processor.")
    has_amx: bool


class Model(_Part):
    name: str = Field(description="As it was given.")
    file: str
    n_bytes: int


class Document(_Part):
    """A run of ``wasi-nn bench``."""

    model_config = ConfigDict(extra="forbid", title="wasi-nn bench")

    form: Literal[1] = Field(default=FORM, description="The version of this file's form.")
    command: str
    extent: Literal["quick", "full"]
    status: Literal["running", "done", "interrupted"] = "running"
    started: datetime
    duration_s: float = 0.0
    machine: Machine
    versions: dict[str, str] = Field(description="Package -> version; llama.cpp's is its commit.")
    model: Model
    warnings: list[str] = Field(default_factory=list)
    scenarios: list[ScenarioResult] = Field(default_factory=list)


def write(document: Document, path: Path) -> None:
    """In one step: a reader, or the next start after a power cut, finds the old file or the new one."""
    part = path.with_suffix(".part")
    part.write_text(document.model_dump_json(indent=2) + "\n", encoding="utf-8")
    os.replace(part, path)


def read(path: Path) -> Document:
    """Raises ``InvalidArgument`` for a file that is not of this form, ``OSError`` for one that cannot be read."""
    try:
        return Document.model_validate_json(path.read_text(encoding="utf-8"))
    except (ValidationError, UnicodeDecodeError) as error:
        first = error.errors()[0] if isinstance(error, ValidationError) else {"loc": (), "msg": str(error)}
        place = ".".join(map(str, first["loc"])) or "the file"
        message = f"{path} is no benchmark of form {FORM}: {place}: {first['msg']}; make one with wasi-nn bench"
        raise InvalidArgument(message) from None
