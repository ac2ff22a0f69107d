"""One accounting for every model: what it holds and what a token costs, from the declaration."""

from dataclasses import dataclass, replace

import jax

from bestiary.kernels.attention.masks import Window
from bestiary.layers.base import L, Layer, abstract, map_layers, params_of
from bestiary.layers.cache import CachePolicy
from bestiary.train.optimizer import Optimizer
from bestiary.train.step import split


@dataclass(frozen=True)
class Accounting:
    """Figures of a model at one context length; FLOPs count matrix products, two per multiply-add.

    Active figures count what a token uses: the kept units of a sparse layer, the keys a query sees
    (averaged over the sequence). Total figures count what the program executes on a whole row, with
    the blocks of keys of which any query sees something. Bytes are those of parameters in their
    stored type and of the cache in the compute type. Models of other things than text are accounted
    for at length 1: a token is what their `unit` says.
    """

    length: int
    params_total: int
    params_active: int
    forward_flops_total: float
    """Per token, one forward pass over a sequence of `length` (training, prefill)."""
    forward_flops_active: float
    training_flops_total: float
    """Per token, forward and backward: three times the forward pass, with what only training
    predicts."""
    training_flops_active: float
    decode_flops_active: float
    """For the token at the end of a sequence of `length`, over the keys that cache policies have
    kept; what they compute to choose is left out."""
    optimizer_bytes: int
    """The optimiser's state, by default AdamW's two moments."""
    decode_bytes_active: float
    """Active parameters and active entries of the cache, which are all but where blocks are chosen:
    what generating one token at batch 1 reads."""
    cache_bytes: int
    """The cache of one sequence of `length` tokens."""

    @property
    def cache_bytes_per_token(self) -> float:
        return self.cache_bytes / self.length


def account(model: Layer, length: int, optimizer: Optimizer | None = None) -> Accounting:
    """Accounts for `model` at context `length`. Raises ValueError for a length below 1."""
    if length < 1:
        raise ValueError(f"length: {length} tokens; need at least 1")
    count, cost, training = model.count(), model.cost(length), model.training_cost(length)
    decoding = as_decoded(model, length)
    shorter = decoding.cost(length - 1).active_flops if length > 1 else 0
    entries = params_of(model.cache_spec(1, length))
    cache = sum(p.nbytes for p in entries)
    read = sum(p.nbytes * p.active for p in entries)
    trained, _ = split(model.declare(), model.declare())
    moments = jax.eval_shape((optimizer or Optimizer()).build(trained).init, abstract(trained))
    return Accounting(
        length=length,
        params_total=count.total,
        params_active=count.active,
        forward_flops_total=cost.flops,
        forward_flops_active=cost.active_flops,
        training_flops_total=3 * training.flops,
        training_flops_active=3 * training.active_flops,
        # what the last token adds to a sequence
        decode_flops_active=length * decoding.cost(length).active_flops - (length - 1) * shorter,
        optimizer_bytes=sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(moments)),
        decode_bytes_active=cost.active_bytes + read,
        cache_bytes=cache,
    )


def as_decoded(model: L, length: int) -> L:
    """`model` whose last token of `length` sees as many keys as its cache policies let it."""

    def one(x: Layer) -> Layer:
        policy = getattr(x, "cache", None)
        if not isinstance(policy, CachePolicy) or policy.complete:
            return x
        # which keys are kept does not matter for their number
        kept = Window(policy.attended(length))
        return replace(x, mask=x.mask & kept)  # type: ignore[attr-defined, call-arg]

    return map_layers(one, model)
