"""Entries of a Hugging Face `config.json`: checked reading, and rotary positions both ways."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from bestiary.layers import rope as ropes
from bestiary.layers.rope import Rope

T = TypeVar("T")


@dataclass(frozen=True)
class Fields:
    """Checked access to the entries of a configuration; null counts as absent.

    Every method raises ValueError, naming the entry, its value and what would be right.
    """

    entries: Mapping[str, Any]
    where: str = "config.json"

    def wrong(self, name: str, need: str) -> ValueError:
        return ValueError(f"{self.where}: {name}: {self.entries.get(name)!r}; need {need}")

    def integer(self, name: str, default: int | None = None, least: int = 1) -> int:
        value = or_default(self.entries.get(name), default)
        if type(value) is not int or not least <= value < 2**31:
            raise self.wrong(name, "a positive integer" if least == 1 else f"{least} or more")
        return value

    def integer_or_none(self, name: str, default: int | None) -> int | None:
        """Here null is not absent: it says that there is none."""
        return None if self.entries.get(name, default) is None else self.integer(name, default)

    def number(self, name: str, default: float | None = None) -> float:
        value = or_default(self.entries.get(name), default)
        if type(value) not in (int, float) or not 0 < value < 1e38:
            raise self.wrong(name, "a positive number")
        return float(value)

    def number_or_none(self, name: str, default: float) -> float | None:
        """Here null is not absent: it says that there is none."""
        return None if self.entries.get(name, default) is None else self.number(name, default)

    def choice(self, name: str, options: Mapping[Any, T], default: Any) -> T:
        value = or_default(self.entries.get(name), default)
        for option, meaning in options.items():
            if type(value) is type(option) and value == option:
                return meaning
        raise self.wrong(name, f"one of {', '.join(map(repr, options))}")

    def fixed(self, **only: Any) -> None:
        """Refuses any value but the one that the family's decoder implements."""
        for name, value in only.items():
            if or_default(self.entries.get(name), value) != value:
                raise self.wrong(name, f"{value!r}: nothing else is supported")


SCALINGS: dict[str, tuple[type[ropes.Scaling], dict[str, str]] | None] = {
    "default": None,
    "linear": (ropes.Linear, {"factor": "factor"}),
    "llama3": (
        ropes.Llama3,
        {
            "factor": "factor",
            "original_length": "original_max_position_embeddings",
            "low_factor": "low_freq_factor",
            "high_factor": "high_freq_factor",
        },
    ),
    "yarn": (
        ropes.Yarn,
        {
            "factor": "factor",
            "original_length": "original_max_position_embeddings",
            "beta_fast": "beta_fast",
            "beta_slow": "beta_slow",
            "mscale": "attention_factor",
        },
    ),
}


def rope_from_fields(f: Fields, theta: float = 10000.0, partial: bool = False) -> Rope:
    """`rope_theta` with `rope_scaling` (transformers 4) or all in `rope_parameters` (5).

    `theta` is the family's default; `partial` says that it may rotate a part of the channels.
    """
    f.fixed(original_max_position_embeddings=None)
    if not partial:
        f.fixed(partial_rotary_factor=1.0)
    name = "rope_scaling" if f.entries.get("rope_scaling") else "rope_parameters"
    entries = or_default(f.entries.get(name), {})
    if not isinstance(entries, dict) or any(isinstance(v, dict) for v in entries.values()):
        raise f.wrong(name, "one flat object for all layers")
    entries = {entry: value for entry, value in entries.items() if value is not None}
    given = {
        "rope_theta": f.entries.get("rope_theta"),
        "partial_rotary_factor": f.entries.get("partial_rotary_factor"),
        "original_max_position_embeddings": f.entries.get("max_position_embeddings"),
        **entries,
    }
    r = Fields(given, f"{f.where}: {name}")
    r.fixed(truncate=True)
    if not partial:
        r.fixed(partial_rotary_factor=1.0)
    fraction = r.number("partial_rotary_factor", 1.0)
    if fraction > 1:
        raise r.wrong("partial_rotary_factor", "at most 1")
    kind = "rope_type" if "rope_type" in given else "type"
    scaling, names = r.choice(kind, SCALINGS, "default") or (None, {})
    known = {"rope_type", "type", "rope_theta", "partial_rotary_factor", "truncate"}
    for entry in sorted(entries.keys() - known - set(names.values())):
        raise r.wrong(entry, f"no such entry for type {given.get(kind, 'default')!r}")
    values: dict[str, Any] = {}
    for field, entry in names.items():
        if field == "original_length":
            values[field] = r.integer(entry)
        elif field == "factor" or entry in given:
            values[field] = r.number(entry)
    rope = Rope(
        theta=r.number("rope_theta", theta),
        fraction=fraction,
        scaling=scaling and scaling(**values),
    )
    if isinstance(s := rope.scaling, ropes.Llama3) and s.low_factor >= s.high_factor:
        raise r.wrong("low_freq_factor", f"less than high_freq_factor {s.high_factor}")
    return rope


def rope_entries(rope: Rope) -> dict[str, Any]:
    """The form of transformers 4, which 5 reads as well."""
    for kind, known in SCALINGS.items():
        if known and type(rope.scaling) is known[0]:
            values = {entry: getattr(rope.scaling, field) for field, entry in known[1].items()}
            values = {entry: value for entry, value in values.items() if value is not None}
            return {"rope_theta": rope.theta, "rope_scaling": {"rope_type": kind} | values}
    return {"rope_theta": rope.theta, "rope_scaling": None}


def or_default(value: Any, default: Any) -> Any:
    return default if value is None else value
