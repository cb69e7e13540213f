"""Which names users may write, and which key each of them means: tables built once from the sections' fields."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

from wasi_nn_backend.config.backend import BackendSettings
from wasi_nn_backend.config.logging import LoggingSettings
from wasi_nn_backend.config.memory import MemorySettings
from wasi_nn_backend.config.model import ModelSettings
from wasi_nn_backend.config.performance import PerformanceSettings
from wasi_nn_backend.config.sampling import SamplingSettings
from wasi_nn_backend.config.section import OutsidePolicy, Section, key_of
from wasi_nn_backend.config.session import SessionSettings
from wasi_nn_backend.config.stopping import StoppingSettings
from wasi_nn_backend.config.task import TaskSettings

__all__ = [
    "INHERITING_SECTIONS",
    "MEMBERS",
    "RUNTIME",
    "SECTIONS",
    "STRICT",
    "TOP_LEVEL",
    "UNSUPPORTED",
    "Target",
    "Unsupported",
    "normalised",
]

#: The section of one call: any key of ``sampling`` and ``stopping``, and -1 for "as it was".
RUNTIME: Final = "runtime"

#: The sections whose keys ``RUNTIME`` holds, and for which -1 means "as it was" in the configuration of one call.
INHERITING_SECTIONS: Final = ("sampling", "stopping")

#: The key, at the top level only, that makes unknown keys of its document an error. It is no setting of the program.
STRICT: Final = "strict"

#: Section name -> its model, in the order of ``Settings``.
SECTIONS: Final[Mapping[str, type[Section]]] = MappingProxyType(
    {
        "backend": BackendSettings,
        "model": ModelSettings,
        "sampling": SamplingSettings,
        "stopping": StoppingSettings,
        "memory": MemorySettings,
        "performance": PerformanceSettings,
        "session": SessionSettings,
        "task": TaskSettings,
        "logging": LoggingSettings,
    }
)


@dataclass(frozen=True, slots=True)
class Unsupported:
    """A key that this version cannot honour: the type of its values and what it asks for.

    Null, false and an empty string ask for nothing; of numbers that is only ``automatic``.
    """

    value_type: type[bool] | type[str] | type[int]
    request: str
    automatic: int | None = None

    def is_asked_for(self, value: bool | str | int | None) -> bool:
        return bool(value) if self.automatic is None else value not in (None, self.automatic)


#: Keys that change what is computed and that this version cannot honour. Switched off (false, an empty string, null; -1
#: for a number) they mean nothing; switched on they must not be passed over in silence, whatever is done with unknown
#: keys.
UNSUPPORTED: Final[Mapping[str, Unsupported]] = MappingProxyType(
    {
        "reranking": Unsupported(bool, "ranking scores instead of text"),
        "mmproj": Unsupported(str, "a projector for images"),
        "image": Unsupported(str, "an image in the prompt"),
        "tts": Unsupported(bool, "speech instead of text"),
        "pooling_type": Unsupported(int, "another pooling of embeddings than the model's own", automatic=-1),
        "attention_type": Unsupported(int, "another attention than the model's own", automatic=-1),
    }
)


@dataclass(frozen=True, slots=True)
class Target:
    """What a written name stands for. ``negated``: the name means the opposite of the boolean key."""

    section: str
    key: str
    outside: OutsidePolicy
    negated: bool = False


def normalised(name: str) -> str:
    """Kebab-case and snake_case are the same name."""
    return name.replace("-", "_")


def _spellings(section: str) -> Iterator[tuple[str, str, Target]]:
    """(section in which it may stand, name, target) of every name of a section's keys."""
    for key, field in SECTIONS[section].model_fields.items():
        written = key_of(field)
        for place in (section, *written.also_in):
            for name in (key, *written.spellings):
                yield place, name, Target(section, key, written.outside)
            for name in written.negations:
                yield place, name, Target(section, key, written.outside, negated=True)


def _build_members() -> Mapping[str, Mapping[str, Target]]:
    members: dict[str, dict[str, Target]] = {section: {} for section in SECTIONS}
    for section in SECTIONS:
        for place, name, target in _spellings(section):
            members[place][name] = target
    members["memory_policy"] = members["memory"]
    members[RUNTIME] = {name: target for section in INHERITING_SECTIONS for name, target in members[section].items()}
    return MappingProxyType({place: MappingProxyType(names) for place, names in members.items()})


def _build_top_level(members: Mapping[str, Mapping[str, Target]]) -> Mapping[str, Target]:
    top_level: dict[str, Target] = {}
    for names in members.values():
        for name, target in names.items():
            if key_of(SECTIONS[target.section].model_fields[target.key]).nested_only:
                continue
            if name in members or name == STRICT or top_level.setdefault(name, target) != target:
                raise TypeError(f"the key {name!r} would be ambiguous at the top level; give it another spelling")
    return MappingProxyType(top_level)


#: Section as written -> name -> target.
MEMBERS: Final = _build_members()

#: Name at the top level -> target, for the flat shape.
TOP_LEVEL: Final = _build_top_level(MEMBERS)
