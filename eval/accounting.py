"""One accounting for every model: what it holds and what a token costs, from the declaration."""

from dataclasses import dataclass

from bestiary.layers.base import params_of
from bestiary.zoo.decoder import Decoder


@dataclass(frozen=True)
class Accounting:
    """Figures of a model at one context length; FLOPs count matrix products, two per multiply-add.

    Active figures count what a token uses: the kept units of a sparse layer, the keys a query sees
    (averaged over the sequence). Total figures count what the dense program executes. Bytes are
    those of parameters in their stored type and of the cache in the compute type.
    """

    length: int
    params_total: int
    params_active: int
    forward_flops_total: float
    """Per token, one forward pass over a sequence of `length` (training, prefill)."""
    forward_flops_active: float
    training_flops_total: float
    """Per token, forward and backward: three times the forward pass."""
    decode_bytes_active: float
    """Active parameters and the whole cache: what generating one token at batch 1 reads."""
    cache_bytes: int
    """The cache of one sequence of `length` tokens."""

    @property
    def cache_bytes_per_token(self) -> float:
        return self.cache_bytes / self.length


def account(model: Decoder, length: int) -> Accounting:
    """Accounts for `model` at context `length`. Raises ValueError for a length below 1."""
    if length < 1:
        raise ValueError(f"length: {length} tokens; need at least 1")
    count, cost = model.count(), model.cost(length)
    cache = sum(p.nbytes for p in params_of(model.cache_spec(1, length)))
    return Accounting(
        length=length,
        params_total=count.total,
        params_active=count.active,
        forward_flops_total=cost.flops,
        forward_flops_active=cost.active_flops,
        training_flops_total=3 * cost.flops,
        decode_bytes_active=cost.active_bytes + cache,
        cache_bytes=cache,
    )
