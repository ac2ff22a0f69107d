"""The decoder-only language model: embedding, patterned blocks, final norm, head."""

from dataclasses import replace
from typing import Any, Literal

import jax
import jax.numpy as jnp

from bestiary.layers.base import (
    Array,
    Aux,
    Context,
    Cost,
    Layer,
    Param,
    Precision,
    Tree,
    is_param,
    layer,
    sum_costs,
)
from bestiary.layers.drop_path import drop_path
from bestiary.layers.linear import Embedding, Linear
from bestiary.layers.norms import RMSNorm
from bestiary.layers.repeat import Chain, Repeat
from bestiary.layers.rows import lend
from bestiary.layers.sharding import shard
from bestiary.zoo.model import Model

STREAM = ("batch", "seq", "embed")


@layer
class Block(Layer):
    """One residual block: a token mixer, then a feed-forward, each with norms placed around it.

    "pre": x + f(norm(x)); "post": norm(x + f(x)); "sandwich": x + norm(f(norm(x))) (Gemma-2).
    """

    mixer: Layer
    ffn: Layer | None
    """None: the mixer is all there is (Mamba)."""
    norm: Layer
    placement: Literal["pre", "post", "sandwich"] = "pre"
    post_starts: tuple[float, float] = (1.0, 1.0)
    """Initial gains of the norms behind mixer and feed-forward (Pangu Ultra: below 1, by depth)."""

    def spec(self) -> Tree:
        spec: Tree = {}
        parts = {"mixer": self.mixer, "ffn": self.ffn}
        for (name, part), start in zip(parts.items(), self.post_starts, strict=True):
            if part is None:
                continue
            norm = self.norm
            spec[name] = part
            if self.placement != "post":
                spec[f"{name}_norm"] = norm
            if self.placement != "pre":
                norm = replace(norm, start=start) if isinstance(norm, RMSNorm) else norm
                spec[f"{name}_post_norm"] = norm
        return spec

    def cache_spec(self, batch: int, length: int, dtype: Any = jnp.float32) -> Tree:
        return {"mixer": self.mixer.cache_spec(batch, length, dtype)}

    def apply(
        self, params: Tree, x: Array, ctx: Context = Context(), cache: Tree = None
    ) -> tuple[Array, Tree, Aux]:
        def norm(name: str, x: Array) -> Array:
            return self.norm.apply(params[name], x) if name in params else x

        def residual(x: Array, y: Array, name: str) -> Array:
            if self.placement == "post":
                return shard(norm(name, x + drop_path(y, ctx, name)), *STREAM)
            return shard(x + drop_path(norm(name, y), ctx, name), *STREAM)

        mixer_cache = None if cache is None else cache["mixer"]
        y, mixer_cache, mixer_aux = self.mixer.apply(
            params["mixer"], norm("mixer_norm", x), ctx, mixer_cache
        )
        x = residual(x, y, "mixer_post_norm")
        cache = None if cache is None else {"mixer": mixer_cache}
        if self.ffn is None:
            return x, cache, Aux.join(mixer=mixer_aux)
        y, ffn_aux = self.ffn.apply(params["ffn"], norm("ffn_norm", x), ctx)
        x = residual(x, y, "ffn_post_norm")
        return x, cache, Aux.join(mixer=mixer_aux, ffn=ffn_aux)


@layer
class MTP(Layer):
    """Predicts one token further (DeepSeek-V3 and Ling 2.0, multi-token prediction).

    h'_t = block(W [norm_e(emb(token_t+1)); norm_h(h_t)]), then a norm of its own; the model's head
    reads token t+2 from it.
    """

    block: Block
    norm: Layer

    @property
    def dim(self) -> int:
        return getattr(self.norm, "dim")  # noqa: B009

    def spec(self) -> Tree:
        norms = {f"{name}_norm": self.norm for name in ("embedding", "hidden", "final")}
        project = Linear(inputs=2 * self.dim, outputs=self.dim, axes=(None, "embed"))
        return norms | {"project": project, "block": self.block}

    def apply(
        self, params: Tree, hidden: Array, following: Array, ctx: Context = Context()
    ) -> tuple[Array, Aux]:
        """Hidden states and embeddings of the following tokens [batch, seq, dim] -> the hidden
        states of one token further."""
        following = self.norm.apply(params["embedding_norm"], following)
        hidden = self.norm.apply(params["hidden_norm"], hidden)
        project = self.spec()["project"]
        x = project.apply(params["project"], jnp.concatenate((following, hidden), -1))
        x, _, aux = self.block.apply(params["block"], shard(x, *STREAM), ctx)
        return self.norm.apply(params["final_norm"], x), Aux.join(block=aux)


@layer
class Decoder(Model):
    """Token ids [batch, seq] -> logits float32 [batch, seq, vocab_size].

    `head` None ties the output to the embedding. The cache holds, beside the blocks' own, how many
    tokens each sequence has seen, so that decoding needs no positions.
    """

    embedding: Embedding
    blocks: Layer
    """One stack of like blocks, or a chain of such stacks (leading dense layers, then mixtures)."""
    norm: Layer
    shared: Layer | None = None
    """Parameters that all blocks use, such as one memory table; they find them in `ctx.shared`."""
    head: Linear | None = None
    mtp: Layer | None = None
    """An `MTP`, for training: a further block, which predicts the token after the next."""
    softcap: float | None = None
    """Bounds the logits to (-c, c) by c tanh(z / c) (Gemma-2)."""
    std: float | None = None
    """Of every matrix at the start; None: as the layers say, mostly 1 / sqrt(inputs)."""
    precision: Precision = Precision()

    def __post_init__(self) -> None:
        if unlike := [type(x).__name__ for x in self.parts if not isinstance(x, Repeat)]:
            raise ValueError(f"blocks: {unlike[0]}; need a Repeat, or a Chain of nothing else")

    @property
    def vocab_size(self) -> int:
        return self.embedding.vocab_size

    def spec(self) -> Tree:
        spec: Tree = {"embedding": self.embedding, "blocks": self.blocks, "norm": self.norm}
        if self.shared is not None:
            spec["shared"] = self.shared
        if self.mtp is not None:
            spec["mtp"] = self.mtp
        return spec if self.head is None else spec | {"head": self.head}

    def with_mtp(self) -> "Decoder":
        """The same model with an `MTP` of its last block and norm."""
        block = self.stacks[-1].block
        block = block.layers[-1] if isinstance(block, Chain) else block
        if not isinstance(block, Block):
            raise ValueError(f"blocks: end in {type(block).__name__}; need a Block to predict by")
        return replace(self, mtp=MTP(block=block, norm=self.norm))

    def cost(self, length: int) -> Cost:
        """Of the forward pass, which leaves `mtp` out."""
        spec = self.spec()
        spec.pop("mtp", None)
        return self.stored(sum_costs(spec, length) + self._tied_head())

    def training_cost(self, length: int) -> Cost:
        """Of the forward pass in training, with the further token's block and head."""
        if self.mtp is None:
            return self.cost(length)
        head = self._tied_head() if self.head is None else self.head.cost(length)
        return self.cost(length) + self.stored(self.mtp.cost(length) + head)

    def _tied_head(self) -> Cost:
        return self.embedding.head_cost() if self.head is None else Cost()

    def cache_spec(self, batch: int, length: int, dtype: Any = None) -> Tree:
        dtype = jnp.dtype(self.precision.compute) if dtype is None else dtype
        return {
            "seen": Param((batch,), ("batch",), dtype=jnp.int32),
            "blocks": self.blocks.cache_spec(batch, length, dtype),
        }

    def init_cache(self, batch: int, length: int, dtype: Any = None) -> Tree:
        return super().init_cache(batch, length, dtype)

    def apply(
        self, params: Tree, tokens: Array, ctx: Context = Context(), cache: Tree = None
    ) -> tuple[Array, Tree, Aux]:
        x, cache, aux = self.hidden(params, tokens, ctx, cache)
        return self.logits(params, x), cache, aux

    def hidden(
        self, params: Tree, tokens: Array, ctx: Context = Context(), cache: Tree = None
    ) -> tuple[Array, Tree, Aux]:
        """The final, normalised hidden states [batch, seq, dim]: what the head reads.

        With a cache, tokens at negative `ctx.positions` are padding: they are neither stored nor
        counted.
        """
        x = self.embedding.apply(params["embedding"], tokens, self.precision.compute)
        x = shard(x, *STREAM)
        ctx = self._context(params, tokens, ctx)
        if cache is None:
            x, _, aux = self.blocks.apply(params["blocks"], x, ctx)
        else:
            positions = ctx.positions
            if positions is None:
                positions = cache["seen"][:, None] + jnp.arange(tokens.shape[1])
            ctx = replace(ctx, positions=positions)
            x, blocks, aux = self.blocks.apply(params["blocks"], x, ctx, cache["blocks"])
            seen = jnp.maximum(cache["seen"], positions.max(1) + 1)
            cache = {"seen": seen, "blocks": blocks}
        aux = replace(Aux.join(blocks=aux), shared={})
        return self.norm.apply(params["norm"], x), cache, aux

    def further(
        self, params: Tree, x: Array, tokens: Array, ctx: Context = Context()
    ) -> tuple[Array, Aux]:
        """From what `hidden` returned and the next token of every position: the same for one token
        further, by `mtp`."""
        assert self.mtp is not None
        following = self.embedding.apply(params["embedding"], tokens, self.precision.compute)
        ctx = self._context(params, tokens, ctx)
        x, aux = self.mtp.apply(params["mtp"], x, following, ctx)
        return x, replace(Aux.join(mtp=aux), shared={})

    def _context(self, params: Tree, tokens: Array, ctx: Context) -> Context:
        """`ctx` with what all blocks may know."""
        if self.shared is not None:
            shared = jax.tree.map(
                lambda p, x: lend(x) if p.table else x,
                self.shared.declare(),
                params["shared"],
                is_leaf=is_param,
            )
            ctx = replace(ctx, shared=ctx.shared | shared)
        return replace(ctx, tokens=tokens)

    def logits(self, params: Tree, x: Array) -> Array:
        """Final hidden states [..., dim] -> float32 [..., vocab_size]."""
        if self.head is None:
            z = self.embedding.logits(params["embedding"], x)
        else:
            z = self.head.apply(params["head"], x, jnp.float32)
        return z if self.softcap is None else self.softcap * jnp.tanh(z / self.softcap)


def plain_decoder(
    *, vocab_size: int, blocks: Layer, norm: RMSNorm, tied: bool = False, **fields: Any
) -> Decoder:
    """A decoder of `norm.dim` with an embedding and, where it is not `tied` to that, a head of its
    own; other `fields` are the `Decoder`'s."""
    dim = norm.dim
    return Decoder(
        embedding=Embedding(vocab_size=vocab_size, dim=dim),
        blocks=blocks,
        norm=norm,
        head=None if tied else Linear(inputs=dim, outputs=vocab_size, axes=("embed", "vocab")),
        **fields,
    )
