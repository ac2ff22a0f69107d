"""Deep Interest Network for click-through rates (Zhou et al. 2018, arXiv 1706.06978)."""

from typing import Any, Literal, get_args

import jax.numpy as jnp

from bestiary.layers.activations import Sigmoid
from bestiary.layers.base import Array, Aux, Cost, Layer, Param, Tree, layer, positive
from bestiary.layers.batch_norm import BatchNorm, run
from bestiary.layers.din import LocalActivationUnit, Normalize, SumPooling
from bestiary.layers.learned_activations import Dice, PReLU
from bestiary.layers.linear import Embedding, Linear
from bestiary.layers.perceptron import Perceptron

Activation = Literal["dice", "prelu", "sigmoid"]
HeadNorm = Literal["affine", "batch"]


@layer
class DIN(Layer):
    """Logits of clicks from a candidate and a user's history: [batch].

    A batch is a dict of int32 arrays: item [batch], history [batch, seq] and, where the model has
    categories, category [batch] and history_category [batch, seq]. Id 0 is no item: padding of a
    history, which counts nowhere.

    q and k_t are an item's embedding beside its category's; u is the pooled history. The head is
    the released demo's: norm and affine map of u, then norm and perceptron of [u, q, u * q], plus a
    bias of the item. The demo calls its batch norms so that they are affine maps: `head_norm`
    "affine", the form of the authors' corrected results; "batch" takes statistics in training.
    """

    unit = "sample"

    num_items: int
    """Ids 1 to num_items."""
    num_categories: int = 0
    """Ids 1 to num_categories; 0: items have no categories."""
    dim: int = 64
    """Of an embedding; of q and k_t twice that where there are categories."""
    pooling: Layer
    """`LocalActivationUnit` or `SumPooling`."""
    head: Perceptron
    """From 3 width to 1."""
    head_norm: HeadNorm = "affine"
    std: float = 0.02
    """Of the initial embeddings, for which the paper gives none."""

    def __post_init__(self) -> None:
        positive(num_items=self.num_items, dim=self.dim)
        if self.num_categories < 0:
            raise ValueError(f"num_categories: {self.num_categories}; need 0 or more")
        if self.head_norm not in get_args(HeadNorm):
            known = ", ".join(get_args(HeadNorm))
            raise ValueError(f"head_norm: {self.head_norm!r}; need one of {known}")
        ends = self.head.widths[0], self.head.widths[-1]
        if ends != (3 * self.width, 1):
            raise ValueError(f"head: from {ends[0]} to {ends[1]}; need {3 * self.width} to 1")

    @property
    def width(self) -> int:
        """Of q, k_t and u."""
        return self.dim * (2 if self.num_categories else 1)

    @property
    def parts(self) -> dict[str, Layer]:
        items = Embedding(vocab_size=self.num_items + 1, dim=self.dim, std=self.std)
        parts: dict[str, Layer] = {"items": items}
        if self.num_categories:
            rows = self.num_categories + 1
            parts["categories"] = Embedding(vocab_size=rows, dim=self.dim, std=self.std)
        return parts | {
            "pooling": self.pooling,
            "interest_norm": _norm(self.width),
            "interest": Linear(inputs=self.width, outputs=self.width, bias=True),
            "head_norm": _norm(3 * self.width),
            "head": self.head,
        }

    def spec(self) -> Tree:
        return self.parts | {"item_bias": Param((self.num_items + 1,), ("vocab",))}

    def cost(self, length: int) -> Cost:
        """Per sample with a history of `length`."""
        parts = self.parts
        once = sum((part.cost(length) for part in parts.values()), Cost())
        embeddings = sum(
            (parts[name].cost(length) for name in ("items", "categories") if name in parts), Cost()
        )
        return once + (embeddings + self.pooling.cost(length)) * length

    def apply(
        self, params: Tree, batch: dict[str, Any], training: bool = False
    ) -> tuple[Array, Aux]:
        parts, aux = self.parts, {}
        q = self.embed(params, batch["item"], batch.get("category"))
        keys = self.embed(params, batch["history"], batch.get("history_category"))
        u, aux["pooling"] = self.pooling.apply(
            params["pooling"], q, keys, batch["history"] > 0, training
        )
        moving = training and self.head_norm == "batch"

        def norm(name: str, x: Array) -> Array:
            y, aux[name] = run(parts[name], params[name], x, moving)
            return y

        u = parts["interest"].apply(params["interest"], norm("interest_norm", u))
        x = norm("head_norm", jnp.concatenate([u, q, u * q], -1))
        x, aux["head"] = self.head.run(params["head"], x, training)
        bias = jnp.take(params["item_bias"], batch["item"], mode="clip")
        return x[:, 0] + bias.astype(x.dtype), Aux.join(**aux)

    def embed(self, params: Tree, items: Array, categories: Array | None) -> Array:
        """Int ids [...] -> [..., width]."""
        x = self.parts["items"].apply(params["items"], items)
        if not self.num_categories:
            return x
        if categories is None:
            raise ValueError("batch: without categories; the model has them")
        return jnp.concatenate(
            [x, self.parts["categories"].apply(params["categories"], categories)], -1
        )


def _norm(dim: int) -> BatchNorm:
    return BatchNorm(dim=dim, eps=1e-3, momentum=0.01)  # TensorFlow's defaults


def din(
    *,
    num_items: int,
    num_categories: int = 0,
    dim: int = 64,
    activation: Activation = "dice",
    normalize: Normalize | None = "none",
    unit_widths: tuple[int, ...] = (80, 40),
    head_widths: tuple[int, ...] = (80, 40),
    head_norm: HeadNorm = "affine",
) -> DIN:
    """With the same activation throughout; `normalize` None pools by a sum (the base model)."""
    if activation not in get_args(Activation):
        known = ", ".join(get_args(Activation))
        raise ValueError(f"activation: {activation!r}; need one of {known}")
    width = dim * (2 if num_categories else 1)

    def activations(widths: tuple[int, ...]) -> tuple[Layer, ...]:
        kinds = {"dice": Dice, "prelu": PReLU}
        return tuple(kinds[activation](dim=w) if activation in kinds else Sigmoid() for w in widths)

    pooling: Layer = SumPooling()
    if normalize is not None:
        pooling = LocalActivationUnit(
            dim=width, widths=unit_widths, activations=activations(unit_widths), normalize=normalize
        )
    head = Perceptron(
        widths=(3 * width, *head_widths, 1), activations=activations(head_widths), gain=1.0
    )
    return DIN(
        num_items=num_items,
        num_categories=num_categories,
        dim=dim,
        pooling=pooling,
        head=head,
        head_norm=head_norm,
    )


def din_electronics() -> DIN:
    """The paper's and demo's sizes for Amazon Electronics: 63,001 items in 801 categories."""
    return din(num_items=63_001, num_categories=801)


def minibatch_aware(table: Array, ids: Array, counts: Array) -> Array:
    """1/2 sum_j |w_j|^2 / n_j over the distinct ids j > 0 of a batch (Zhou et al. 2018, eq. 6-7).

    Args:
      table: embeddings [rows, dim], of which those of the batch are penalised, whatever the rest.
      ids: int [...] of the batch; 0 stands for none.
      counts: float32 [...], n_j of each id: how often j occurs in all the data.

    Returns:
      float32 scalar; its gradient is w_j / n_j for rows of the batch and 0 elsewhere.
    """
    ids, counts = ids.reshape(-1), counts.reshape(-1)
    unique, at = jnp.unique(ids, return_index=True, size=ids.size, fill_value=0)
    rows = jnp.take(table, unique, axis=0, mode="clip").astype(jnp.float32)
    share = jnp.where(unique > 0, 1 / jnp.maximum(counts[at], 1), 0)
    return 0.5 * (share * jnp.square(rows).sum(-1)).sum()
