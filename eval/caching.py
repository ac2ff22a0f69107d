"""Cache policies by name, for the command line, and a model under another policy."""

from dataclasses import dataclass, fields, replace
from typing import Any, Literal

from bestiary.layers.base import Layer, map_layers
from bestiary.layers.cache import CachePolicy, Full, SinksWindow
from bestiary.layers.cache_eviction import H2O, Heads, SnapKV
from bestiary.layers.cache_kivi import KIVI
from bestiary.zoo.decoder import Block, Decoder

Name = Literal["full", "sinks-window", "h2o", "snapkv", "kivi2", "kivi4", "kivi8"]
KIVI_SETTINGS = ("cache_group_size", "cache_residual")
SETTINGS: dict[str, tuple[str, ...]] = {
    "full": (),
    "sinks-window": ("cache_budget", "cache_sinks"),
    "h2o": ("cache_budget", "cache_recent", "cache_heads"),
    "snapkv": ("cache_budget", "cache_recent", "cache_heads"),
    "kivi2": KIVI_SETTINGS,
    "kivi4": KIVI_SETTINGS,
    "kivi8": KIVI_SETTINGS,
}


@dataclass(frozen=True, kw_only=True)
class Caching:
    """A cache policy and its settings."""

    cache: Name | None = None
    """What decoding keeps of the tokens before, in place of the model's own policy. Layers with a
    window keep it."""
    cache_budget: int | None = None
    """Tokens that sinks-window, h2o and snapkv keep, 256 by default."""
    cache_sinks: int | None = None
    """Of the budget of sinks-window, the first tokens of a document, 4 by default."""
    cache_recent: int | None = None
    """Of the budget, the newest tokens that stay in any case: half of it for h2o by default; for
    snapkv, which chooses by what they attend to, 32 or half of it."""
    cache_heads: Heads | None = None
    """Whether h2o and snapkv choose for each key-value head (kv, the default) or for each query
    head (query), as in the papers, with keys and values stored once per query head."""
    cache_group_size: int | None = None
    """Numbers of one scale in kivi, 32 by default."""
    cache_residual: int | None = None
    """Newest tokens that kivi does not quantise, 128 by default."""

    def __post_init__(self) -> None:
        given = [f.name for f in fields(self)[1:] if getattr(self, f.name) is not None]
        taken = () if self.cache is None else SETTINGS[self.cache]
        for name in given:
            if name not in taken:
                takes = [known for known, settings in SETTINGS.items() if name in settings]
                raise ValueError(
                    f"{name}: {getattr(self, name)} beside cache {self.cache or 'unset'}; need "
                    f"cache {' or '.join(takes)}"
                )
        self.policy()  # refuses impossible numbers

    def policy(self, room: int = 1) -> CachePolicy:
        """The policy; snapkv's with room for so many tokens behind the prompt."""
        budget = 256 if self.cache_budget is None else self.cache_budget
        if budget < 2:
            raise ValueError(f"cache_budget: {budget}; need at least 2")

        def part(value: int | None, default: int, name: str) -> int:
            value = default if value is None else value
            if not 0 < value < budget:
                raise ValueError(f"{name}: {value}; need 1 to {budget - 1} of cache_budget")
            return value

        heads = self.cache_heads or "kv"
        match self.cache:
            case None | "full":
                return Full()
            case "sinks-window":
                sinks = part(self.cache_sinks, min(4, budget // 2), "cache_sinks")
                return SinksWindow(sinks=sinks, window=budget - sinks)
            case "h2o":
                recent = part(self.cache_recent, budget // 2, "cache_recent")
                return H2O(heavy=budget - recent, recent=recent, heads=heads)
            case "snapkv":
                recent = part(self.cache_recent, min(32, budget // 2), "cache_recent")
                return SnapKV(capacity=budget, window=recent, heads=heads, room=room)
            case name:
                given = {"group_size": self.cache_group_size, "residual": self.cache_residual}
                chosen: dict[str, Any] = {k: v for k, v in given.items() if v is not None}
                return KIVI(bits=int(name.removeprefix("kivi")), **chosen)


def with_cache(model: Decoder, policy: CachePolicy) -> tuple[Decoder, list[str]]:
    """The model with `policy` in every token mixer that takes one, and the mixers that do not.

    A window is a policy already. Raises ValueError when no mixer takes it.
    """
    others: set[str] = set()
    taken = False

    def changed(x: Layer) -> Layer:
        nonlocal taken
        if isinstance(x, Block) and not hasattr(x.mixer, "cache"):
            others.add(type(x.mixer).__name__)
        if not isinstance(getattr(x, "cache", None), CachePolicy):
            return x
        window = getattr(x, "window", None)
        if window is not None:
            others.add(f"{type(x).__name__} with window {window}")
            return x
        taken = True
        return replace(x, cache=policy)  # type: ignore[call-arg]

    model = map_layers(changed, model)
    if not taken:
        raise ValueError(f"cache: the model has {', '.join(sorted(others))}; none takes a policy")
    return model, sorted(others)
