"""Mixture of latent experts (MoLE / MoLAE, Liu et al. 2025, arXiv 2503.23100): experts of a group
share one projection into a small latent space.

`factorise` and `convert` make them of a trained mixture of experts.
"""

from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bestiary.layers.activations import Silu
from bestiary.layers.base import (
    Array,
    Aux,
    Context,
    Cost,
    Layer,
    Param,
    Tree,
    layer,
    map_params,
    params_of,
    positive,
    weight,
)
from bestiary.layers.feedforward import GLU, HIDDEN
from bestiary.layers.moe import MoE, sorted_by_expert
from bestiary.layers.router import Router, Routing
from bestiary.layers.sharding import dot


@layer
class LatentGLU(Layer):
    """One expert: y = (act(z_gate A_gate) * (z_up A_up)) W_down of the latents z = [z_gate | z_up].

    [batch, seq, 2 latent] -> [batch, seq, dim].
    """

    dim: int
    latent: int
    hidden: int
    activation: Layer = Silu()
    out_gain: float = 1.0

    def __post_init__(self) -> None:
        positive(dim=self.dim, latent=self.latent, hidden=self.hidden)

    def spec(self) -> Tree:
        return {
            "gate": weight((self.latent, self.hidden), (None, "mlp")),
            "up": weight((self.latent, self.hidden), (None, "mlp")),
            "activation": self.activation,
            "down": weight((self.hidden, self.dim), ("mlp", "embed"), gain=self.out_gain),
        }

    def apply(self, params: Tree, z: Array, ctx: Context = Context()) -> tuple[Array, Aux]:
        gate = dot("bsm,mf->bsf", z[..., : self.latent], params["gate"], out=HIDDEN)
        gate = self.activation.apply(params["activation"], gate)
        up = dot("bsm,mf->bsf", z[..., self.latent :], params["up"], out=HIDDEN)
        return dot("bsf,fd->bsd", gate * up, params["down"]), Aux()


@layer
class LatentExperts(Layer):
    """y = sum_k w_k expert_k([x B_gate | x B_up]) + shared(x), B those of the expert's group.

    [batch, seq, dim] -> the same; dropless. Groups are runs of `group_size` experts. Latents are
    computed once per token and group, and it is they that travel to an expert on another device.

    Raises ValueError when the groups do not divide the experts.
    """

    router: Router
    group_size: int
    latent: int
    """Width m of the latent space; the paper takes that of the experts."""
    hidden: int
    activation: Layer = Silu()
    shared: Layer | None = None
    """A feed-forward that every token uses."""
    out_gain: float = 1.0
    """Scales the experts' initial output projections."""

    def __post_init__(self) -> None:
        positive(group_size=self.group_size, latent=self.latent, hidden=self.hidden)
        if self.router.num_experts % self.group_size:
            raise ValueError(
                f"group_size: {self.group_size}; need a divisor of the router's num_experts "
                f"{self.router.num_experts}"
            )

    @property
    def dim(self) -> int:
        return self.router.dim

    @property
    def groups(self) -> int:
        return self.router.num_experts // self.group_size

    @property
    def expert(self) -> LatentGLU:
        return LatentGLU(
            dim=self.dim,
            latent=self.latent,
            hidden=self.hidden,
            activation=self.activation,
            out_gain=self.out_gain,
        )

    def spec(self) -> Tree:
        n, used = self.router.num_experts, self.router.top_k

        def stacked(p: Param) -> Param:
            return p if p.inputs is None else replace(p.stack(n, "experts"), active=used / n)

        shape, active = (self.dim, self.groups, self.latent), min(1.0, used / self.groups)
        latents = weight(shape, ("embed", None, None), active=active)
        spec: Tree = {
            "router": self.router,
            "latents": {"gate": latents, "up": latents},
            "experts": map_params(stacked, self.expert.declare()),
        }
        return spec if self.shared is None else spec | {"shared": self.shared}

    def cost(self, length: int) -> Cost:
        """A token costs the experts that it uses and the latents of all groups."""
        unused = self.router.num_experts - self.router.top_k
        one = sum(p.cost().flops for p in params_of(self.expert.declare()))
        return super().cost(length) + Cost(-unused * one)

    def apply(self, params: Tree, x: Array, ctx: Context = Context()) -> tuple[Array, Aux]:
        routing, aux = self.router.apply(params["router"], x, ctx)
        latents = [dot("bsd,dgm->bsgm", x, params["latents"][name]) for name in ("gate", "up")]
        z = jnp.concatenate(latents, -1)
        # every choice of an expert becomes a token of its own, with the latents of its group
        group = jnp.minimum(routing.experts // self.group_size, self.groups - 1)
        z = jnp.take_along_axis(z, group[..., None], 2)
        batch, length, top_k, width = z.shape
        choices = Routing(*(r.reshape(batch, length * top_k, 1) for r in routing))
        y = sorted_by_expert(
            self.expert,
            params["experts"],
            z.reshape(batch, length * top_k, width),
            choices,
            self.router.num_experts,
            ctx,
        )
        y = y.reshape(batch, length, top_k, -1).sum(2)
        parts = {"router": aux}
        if self.shared is not None:
            shared, parts["shared"] = self.shared.apply(params["shared"], x, ctx)
            y += shared
        return y, Aux.join(**parts)


class Factors(NamedTuple):
    """Stacked matrices W_e [dim, hidden] as B_j A_e, j the group of e; float64.

    error: sum of the squared errors of a group [groups]; energy: of its squared matrices. Both are
    measured on the inputs' second moment where one was given.
    """

    shared: np.ndarray
    """B: [dim, groups, latent]."""
    own: np.ndarray
    """A: [experts, latent, hidden]."""
    error: np.ndarray
    energy: np.ndarray
    ranks: np.ndarray
    """int [groups]: of the group's matrices side by side."""

    @property
    def exact(self) -> np.ndarray:
        """Which groups lose nothing: their matrices read from one space of `latent` dimensions."""
        return self.ranks <= self.own.shape[1]

    @property
    def lost(self) -> np.ndarray:
        """Share of each group's energy that is lost."""
        return self.error / self.energy


def factorise(
    w: Any,
    group_size: int,
    latent: int,
    *,
    expert_rank: int | None = None,
    moment: Any = None,
    eps: float = 1e-6,
) -> Factors:
    """The best common factor of every `group_size` matrices: minimises sum_e ||W_e - B A_e||^2.

    From the singular vectors of the group's matrices side by side: B is unique up to an invertible
    map of the latent space.

    Args:
      w: [experts, dim, hidden].
      latent: width of the space that the matrices of a group share, the rank of B.
      expert_rank: first replaces every matrix by its best approximation of this rank, which may
        bring the group nearer to `latent` (the paper's first phase).
      moment: [dim, dim], mean of x x^T over inputs: minimises the error of x W instead of that of
        W; `eps` is added to its diagonal.

    Raises:
      ValueError: `latent` above what the shapes allow, groups that do not divide the experts, a
        moment of another shape.
    """
    w = np.asarray(w, np.float64)
    experts, dim, hidden = w.shape
    positive(group_size=group_size, latent=latent, expert_rank=expert_rank)
    if experts % group_size:
        raise ValueError(f"group_size: {group_size}; need a divisor of the {experts} experts")
    if latent > min(dim, group_size * hidden):
        raise ValueError(f"latent: {latent}; need at most {min(dim, group_size * hidden)}")
    whiten = np.eye(dim)
    if moment is not None:
        if np.shape(moment) != (dim, dim):
            raise ValueError(f"moment: shape {np.shape(moment)}; need {(dim, dim)}")
        whiten = np.linalg.cholesky(np.asarray(moment, np.float64) + eps * np.eye(dim))
    seen = whiten.T @ w
    reduced = seen
    if expert_rank is not None:
        u, s, vt = np.linalg.svd(seen, full_matrices=False)
        reduced = (u[..., :expert_rank] * s[:, None, :expert_rank]) @ vt[:, :expert_rank]

    def side_by_side(w: np.ndarray) -> np.ndarray:
        groups = w.reshape(-1, group_size, dim, hidden).swapaxes(1, 2)
        return groups.reshape(len(groups), dim, group_size * hidden)

    u, s, _ = np.linalg.svd(side_by_side(reduced), full_matrices=False)
    basis = u[..., :latent]
    own = np.repeat(basis, group_size, 0).swapaxes(1, 2) @ reduced
    missed = side_by_side(seen) - basis @ basis.swapaxes(1, 2) @ side_by_side(reduced)
    largest = s[:, :1] * max(dim, group_size * hidden) * np.finfo(np.float32).eps
    return Factors(
        shared=np.linalg.solve(whiten.T, basis).swapaxes(0, 1),
        own=own,
        error=np.square(missed).sum((1, 2)),
        energy=np.square(seen).sum((1, 2)).reshape(-1, group_size).sum(1),
        ranks=(s > largest).sum(1),
    )


def convert(
    moe: MoE,
    params: Tree,
    group_size: int,
    latent: int,
    *,
    expert_rank: int | None = None,
    moment: Any = None,
) -> tuple[LatentExperts, Tree, dict[str, Factors]]:
    """Latent experts that come nearest to a trained mixture, their parameters, and the factors of
    "gate" and "up", which say what is lost. Router, down projections and shared expert stay.

    The arguments are those of `factorise`. Raises ValueError unless the experts are `GLU`s and
    nothing is dropped.
    """
    if not isinstance(moe.expert, GLU):
        raise ValueError(f"expert: {type(moe.expert).__name__}; only a GLU can be converted")
    if moe.capacity_factor is not None:
        raise ValueError(f"capacity_factor: {moe.capacity_factor}; latent experts drop nothing")
    layer = LatentExperts(
        router=moe.router,
        group_size=group_size,
        latent=latent,
        hidden=moe.expert.hidden,
        activation=moe.expert.activation,
        shared=moe.shared,
        out_gain=moe.expert.out_gain,
    )
    old = params["experts"]
    factors = {
        name: factorise(old[name], group_size, latent, expert_rank=expert_rank, moment=moment)
        for name in ("gate", "up")
    }

    def stored(name: str, part: np.ndarray) -> jax.Array:
        return jnp.asarray(part, old[name].dtype)

    latents = {name: stored(name, f.shared) for name, f in factors.items()}
    own = {name: stored(name, f.own) for name, f in factors.items()}
    return layer, params | {"latents": latents, "experts": old | own}, factors
