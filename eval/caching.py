"""Cache policies by name, for the command line, and a model under another policy."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from itertools import repeat
from typing import Any, Literal

import jax

from bestiary.layers.base import Layer, Tree, map_layers
from bestiary.layers.cache import CachePolicy, Full, SinksWindow
from bestiary.layers.cache_eviction import H2O, Heads, SnapKV
from bestiary.layers.cache_kivi import KIVI
from bestiary.layers.kv_selection import pyramid_budgets
from bestiary.layers.repeat import Chain, Repeat
from bestiary.zoo.decoder import Block, Decoder

Name = Literal["full", "sinks-window", "h2o", "snapkv", "pyramidkv", "kivi2", "kivi4", "kivi8"]
KIVI_SETTINGS = ("cache_group_size", "cache_residual")
SETTINGS: dict[str, tuple[str, ...]] = {
    "full": (),
    "sinks-window": ("cache_budget", "cache_sinks"),
    "h2o": ("cache_budget", "cache_recent", "cache_heads"),
    "snapkv": ("cache_budget", "cache_recent", "cache_heads"),
    "pyramidkv": ("cache_budget", "cache_recent", "cache_heads"),
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
    """Tokens that sinks-window, h2o and snapkv keep, 256 by default; pyramidkv on average over the
    layers, the lower ones more and the upper ones fewer."""
    cache_sinks: int | None = None
    """Of the budget of sinks-window, the first tokens of a document, 4 by default."""
    cache_recent: int | None = None
    """Of the budget, the newest tokens that stay in any case: half of it for h2o by default; for
    snapkv and pyramidkv, which choose by what they attend to, 32 or half of it."""
    cache_heads: Heads | None = None
    """Whether h2o, snapkv and pyramidkv choose for each key-value head (kv, the default) or for
    each query head (query), as in the papers, with keys and values stored once per query head."""
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

    def apply(
        self, model: Decoder, params: Tree, length: int, room: int = 1
    ) -> tuple[Decoder, Tree, list[str]]:
        """The model under the policy, its parameters (or None), and the mixers that do not take it.

        Layers that keep different numbers of `length` tokens are taken apart. Raises ValueError
        when no mixer takes the policy.
        """
        policy = self.policy(room)
        if self.cache != "pyramidkv":
            model, others = with_cache(model, policy)
            return model, params, others
        assert isinstance(policy, SnapKV)
        if params is not None:
            params = params | {"blocks": params_apart(model.blocks, params["blocks"])}
        model = replace(model, blocks=apart(model.blocks))
        layers = max(num_takers(model), 1)
        budgets = pyramid_budgets(length, policy.capacity, layers, policy.window)
        model, others = with_cache(model, [replace(policy, capacity=n) for n in budgets])
        return model, params, others

    def policy(self, room: int = 1) -> CachePolicy:
        """The policy, pyramidkv's that of its average layer; snapkv's with room for so many tokens
        behind the prompt."""
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
            case "snapkv" | "pyramidkv":
                recent = part(self.cache_recent, min(32, budget // 2), "cache_recent")
                return SnapKV(capacity=budget, window=recent, heads=heads, room=room)
            case name:
                given = {"group_size": self.cache_group_size, "residual": self.cache_residual}
                chosen: dict[str, Any] = {k: v for k, v in given.items() if v is not None}
                return KIVI(bits=int(name.removeprefix("kivi")), **chosen)


def with_cache(
    model: Decoder, policy: CachePolicy | Sequence[CachePolicy]
) -> tuple[Decoder, list[str]]:
    """The model with `policy`, or one for each layer, in every token mixer that takes one, and the
    mixers that do not.

    A window is a policy already. Raises ValueError when no mixer takes it.
    """
    others: set[str] = set()
    policies = repeat(policy) if isinstance(policy, CachePolicy) else iter(policy)

    def changed(x: Layer) -> Layer:
        if isinstance(x, Block) and not hasattr(x.mixer, "cache"):
            others.add(type(x.mixer).__name__)
        if takes(x):
            return replace(x, cache=next(policies))  # type: ignore[call-arg, type-var]
        if isinstance(getattr(x, "cache", None), CachePolicy):
            others.add(f"{type(x).__name__} with window {x.window}")  # type: ignore[attr-defined]
        return x

    taken = num_takers(model)
    model = map_layers(changed, model)
    if not taken:
        raise ValueError(f"cache: the model has {', '.join(sorted(others))}; none takes a policy")
    return model, sorted(others)


def takes(x: Layer) -> bool:
    """Whether a layer is a token mixer that takes a policy."""
    return isinstance(getattr(x, "cache", None), CachePolicy) and getattr(x, "window", None) is None


def num_takers(model: Layer) -> int:
    count = 0

    def seen(x: Layer) -> Layer:
        nonlocal count
        count += takes(x)
        return x

    map_layers(seen, model)
    return count


def apart(blocks: Layer) -> Layer:
    """Repeats as chains of repeats of one, which may then differ."""
    if isinstance(blocks, Chain):
        return Chain(layers=tuple(apart(member) for member in blocks.layers))
    if not isinstance(blocks, Repeat):
        return blocks

    def one(i: int) -> Repeat:
        constants = tuple((name, values[i : i + 1]) for name, values in blocks.constants)
        return replace(blocks, n=1, unroll=1, constants=constants)

    return Chain(layers=tuple(one(i) for i in range(blocks.n)))


def params_apart(blocks: Layer, params: Tree) -> Tree:
    """The parameters of `apart(blocks)`."""
    if isinstance(blocks, Chain):
        members = enumerate(blocks.layers)
        return {str(i): params_apart(member, params[str(i)]) for i, member in members}
    if not isinstance(blocks, Repeat):
        return params
    return {str(i): jax.tree.map(lambda p, i=i: p[i : i + 1], params) for i in range(blocks.n)}
