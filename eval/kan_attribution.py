"""What the edges and nodes of a KAN matter, the penalty that thins them out, and pruning.

As pykan does it (Liu et al. 2024, arXiv 2404.19756 and 2408.10205). All are pure functions beside
the forward pass, which keeps nothing for them.
"""

from typing import NamedTuple

import jax.numpy as jnp

from bestiary.layers.base import Array, Tree
from bestiary.layers.kan import edges
from bestiary.layers.kan_net import KANNet


class Spread(NamedTuple):
    """Standard deviations over the samples, of one layer."""

    inputs: Array  # [inputs]
    edges: Array  # [outputs, inputs]
    outputs: Array  # [outputs]


class Scores(NamedTuple):
    """Shares of the network's outputs, averaged over these."""

    edges: tuple[Array, ...]  # of every layer, [outputs, inputs]
    nodes: tuple[Array, ...]  # of every entry of dims, [nodes]


def spreads(net: KANNet, params: Tree, x: Array) -> list[Spread]:
    """How far inputs, edges and outputs of every layer vary over x [samples, inputs]."""
    found = []
    for i, (kan, values) in enumerate(zip(net.layers, net.trace(params, x), strict=False)):
        curves = edges(kan, params[str(i)], values)
        found.append(Spread(std(values), std(curves), std(curves.sum(-1))))
    return found


def std(x: Array) -> Array:
    """Over the first axis, with gradient 0 where nothing varies."""
    variance = jnp.var(x, 0)
    return jnp.where(variance > 0, jnp.sqrt(jnp.where(variance > 0, variance, 1)), 0)


def edge_scores(net: KANNet, params: Tree, x: Array) -> list[Array]:
    """std of the edge / (std of its input + 0.1) over the samples x [samples, inputs], for every
    layer [outputs, inputs] (pykan's "edge_forward_spline_n")."""
    return [s.edges / (s.inputs + 0.1) for s in spreads(net, params, x)]


def attribute(net: KANNet, params: Tree, x: Array) -> Scores:
    """Scores by going backwards (KAN 2.0, section 4.1): a node hands its score on to the edges that
    reach it by their std over its own, and a node's score is the sum of those of the edges that
    leave it. Every output begins with 1. A multiplying node hands its score to all of its factors.
    """
    of_edges: list[Array] = []
    score = jnp.eye(sum(net.nodes[-1]))  # of every output: [outputs of the network, nodes]
    of_nodes = [score]
    found = list(enumerate(spreads(net, params, x)))
    for i, spread in reversed(found):
        adding = net.nodes[i + 1][0]
        factors = jnp.repeat(score[:, adding:], net.arity, 1)
        score = jnp.concatenate([score[:, :adding], factors], 1) / (spread.outputs + 1e-4)
        of_edges.append(score[:, :, None] * spread.edges)
        score = of_edges[-1].sum(1)
        of_nodes.append(score)
    edges, nodes = ([s.mean(0) for s in reversed(scores)] for scores in (of_edges, of_nodes))
    return Scores(tuple(edges), tuple(nodes))


def penalty(
    net: KANNet,
    params: Tree,
    x: Array,
    *,
    lambda_1: float = 1.0,
    lambda_entropy: float = 2.0,
    lambda_coefficients: float = 0.0,
    lambda_differences: float = 0.0,
) -> Array:
    """What to add to a loss, times a factor of 1e-4 to 1e-2, so that few edges remain: a scalar.

    sum over layers of lambda_1 sum v + lambda_entropy (sum_o H(v_o,:) + sum_i H(v_:,i) as means),
    v the edge scores at x [samples, inputs] and H(v) = -sum p log2(p + 1e-4) of p = v / (sum v +
    1); and of the mean absolute coefficients of all edges, and of the mean absolute differences of
    neighbouring ones.
    """
    total = jnp.float32(0)
    for i, v in enumerate(edge_scores(net, params, x)):
        total += lambda_1 * v.sum() + lambda_entropy * (entropy(v, 1) + entropy(v, 0))
        weight = params[str(i)]["weight"]  # [size, inputs, outputs]
        if lambda_coefficients:
            total += lambda_coefficients * jnp.abs(weight).mean(0).sum()
        if lambda_differences:
            total += lambda_differences * jnp.abs(jnp.diff(weight, axis=0)).mean(0).sum()
    return total


def entropy(v: Array, axis: int) -> Array:
    """In bits, along an axis of scores [outputs, inputs], averaged over the other."""
    p = v / (v.sum(axis, keepdims=True) + 1)
    return -(p * jnp.log2(p + 1e-4)).sum(axis).mean()


def prune(
    net: KANNet,
    params: Tree,
    x: Array,
    *,
    node_threshold: float = 1e-2,
    edge_threshold: float = 3e-2,
) -> Tree:
    """The parameters with 0 in the masks of what scores below the thresholds at x [samples,
    inputs]: hidden nodes with all their edges, then edges, until no more fall.

    Raises ValueError when the network has no masks.
    """
    if not net.mask:
        raise ValueError("mask: False; need True to prune")
    last = len(net.layers) - 1
    nodes = [score > node_threshold for score in attribute(net, params, x).nodes]
    for i in range(last + 1):
        arriving = jnp.ones(1, bool) if i == last else subnodes(net, i + 1, nodes[i + 1])
        leaving = jnp.ones(1, bool) if i == 0 else nodes[i]
        params = masked(params, i, leaving[:, None] & arriving)
    for _ in net.layers:  # a node that loses its last edge takes those of one more layer along
        for i, score in enumerate(attribute(net, params, x).edges):
            params = masked(params, i, score.T > edge_threshold)
    return params


def subnodes(net: KANNet, i: int, nodes: Array) -> Array:
    """What is said of the nodes of entry i of dims, said of what their layer puts out."""
    adding = net.nodes[i][0]
    return jnp.concatenate([nodes[:adding], jnp.repeat(nodes[adding:], net.arity)])


def masked(params: Tree, i: int, kept: Array) -> Tree:
    """With the edges of layer i [inputs, outputs] that are not kept masked too."""
    layer = params[str(i)]
    return params | {str(i): layer | {"mask": jnp.where(kept, layer["mask"], 0)}}


def num_edges(params: Tree) -> int:
    """How many edges no mask hides."""
    return sum(int((layer["mask"] != 0).sum()) for layer in params.values() if "mask" in layer)
