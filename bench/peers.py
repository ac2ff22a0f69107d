"""The layers' formulas in straightforward, eager PyTorch: the peers of bench/layers.py.

A peer takes the layer, whose fields are its numbers, the layer's parameters by path, and x [batch,
seq, dim]; it returns y. The matrices of experts come as lists, one tensor each.
"""

from statistics import NormalDist
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Weights = dict[str, Any]


# --- feed-forwards --------------------------------------------------------------------------------


def statistical_top_k(z: Tensor, share: float) -> Tensor:
    threshold = z.mean(-1, keepdim=True) + z.std(-1, correction=0, keepdim=True) * (
        NormalDist().inv_cdf(1 - share)
    )
    return F.relu(z - threshold)


def spark_ffn(layer: Any, w: Weights, x: Tensor) -> Tensor:
    r = layer.predictor_dim
    kept = statistical_top_k(x[..., :r] @ w["predictor"], layer.top_k / layer.hidden)
    return (F.gelu(kept, approximate="tanh") * (x[..., r:] @ w["value"])) @ w["out"]


def gaussian_glu(layer: Any, w: Weights, x: Tensor) -> Tensor:
    kept = statistical_top_k(x @ w["gate"], 1 - layer.sparsity)
    return (F.gelu(kept, approximate="tanh") * (x @ w["up"])) @ w["down"]


def poly_norm_mlp(layer: Any, w: Weights, x: Tensor) -> Tensor:
    u, a = x @ w["up"], w["activation/weight"]

    def normed(v: Tensor) -> Tensor:
        return v * torch.rsqrt(v.square().mean(-1, keepdim=True) + layer.activation.eps)

    h = a[0] * normed(u**3) + a[1] * normed(u**2) + a[2] * normed(u) + w["activation/bias"]
    return h @ w["down"]


def block_ffn(layer: Any, w: Weights, x: Tensor) -> Tensor:
    a = F.relu(x @ w["router"])
    a = a * torch.rsqrt(a.square().mean(-1, keepdim=True) + layer.eps) * w["gain"]
    h = F.silu(x @ w["up"]).unflatten(-1, (layer.num_experts, layer.expert_dim))
    return (h * a[..., None]).flatten(-2) @ w["down"]


def mohd_ffn(layer: Any, w: Weights, x: Tensor) -> Tensor:
    gate = layer.gate
    s = torch.softmax(x @ w["gate/centroids"], -1)
    special = s[..., gate.num_shared :]
    best, at = special.topk(gate.top_k)
    chosen = torch.zeros_like(special).scatter(-1, at, best)
    g = torch.cat((s[..., : gate.num_shared], chosen), -1)
    g = gate.num * g.sum(-1, keepdim=True) * g
    u = (x @ w["up"]).unflatten(-1, (gate.num, -1)) * g[..., None]
    h = torch.einsum("bsni,nij->bsnj", u, w["fusion/block"]).flatten(-2)
    return F.silu(h) @ w["down"]


# --- mixtures of experts --------------------------------------------------------------------------


def route(router: Any, w: Weights, x: Tensor) -> tuple[Tensor, Tensor]:
    """Weights and experts [tokens, top_k]."""
    logits = x @ w["router/weight"]
    scores = torch.sigmoid(logits) if router.score == "sigmoid" else torch.softmax(logits, -1)
    biased = scores.detach() + w.get("router/bias", 0)
    if router.num_groups > 1:
        groups = biased.unflatten(-1, (router.num_groups, -1))
        best = groups.topk(router.group_top).values.sum(-1)
        kept = torch.zeros_like(best).scatter(-1, best.topk(router.top_groups).indices, 1.0)
        biased = groups.masked_fill(kept[..., None] == 0, -torch.inf).flatten(-2)
    experts = biased.topk(router.top_k).indices
    weights = scores.gather(-1, experts)
    if router.normalize:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    return router.scale * weights, experts


def moe(layer: Any, w: Weights, x: Tensor) -> Tensor:
    flat = x.flatten(0, 1)
    weights, experts = route(layer.router, w, flat)
    y = torch.zeros_like(flat)
    for e in range(layer.router.num_experts):
        token, slot = torch.where(experts == e)
        mine = flat[token]
        h = F.silu(mine @ w["experts/gate"][e]) * (mine @ w["experts/up"][e])
        y.index_add_(0, token, (h @ w["experts/down"][e]) * weights[token, slot, None])
    if layer.shared is not None:
        h = F.silu(flat @ w["shared/gate"]) * (flat @ w["shared/up"])
        y = y + h @ w["shared/down"]
    return y.view_as(x)


def latent_experts(layer: Any, w: Weights, x: Tensor) -> Tensor:
    flat = x.flatten(0, 1)
    weights, experts = route(layer.router, w, flat)
    gates, ups = (
        torch.einsum("nd,dgm->gnm", flat, w[f"latents/{name}"]).unbind(0) for name in ("gate", "up")
    )
    y = torch.zeros_like(flat)
    for e in range(layer.router.num_experts):
        token, slot = torch.where(experts == e)
        group = e // layer.group_size
        gate, up = gates[group][token], ups[group][token]
        h = F.silu(gate @ w["experts/gate"][e]) * (up @ w["experts/up"][e])
        y.index_add_(0, token, (h @ w["experts/down"][e]) * weights[token, slot, None])
    return y.view_as(x)


# --- memories -------------------------------------------------------------------------------------


def product_keys(layer: Any, w: Weights, x: Tensor) -> tuple[Tensor, Tensor]:
    """Weights and rows [tokens, heads * top_k]."""
    q = torch.einsum("nd,dhpk->nhpk", x, w["query"]) + w["query_bias"]
    scores = torch.einsum("nhpk,hpkm->nhpm", q, w["keys"])
    (row, i), (column, j) = (scores[..., p, :].topk(layer.top_k) for p in (0, 1))
    best, at = (row[..., :, None] + column[..., None, :]).flatten(-2).topk(layer.top_k)
    rows = i.gather(-1, at // layer.top_k) * layer.num_keys + j.gather(-1, at % layer.top_k)
    return torch.softmax(best, -1).flatten(1), rows.flatten(1)


def weighted_rows(table: Tensor, rows: Tensor, weights: Tensor) -> Tensor:
    return F.embedding_bag(rows, table.flatten(1), per_sample_weights=weights, mode="sum")


def pkm(layer: Any, w: Weights, x: Tensor) -> Tensor:
    weights, rows = product_keys(layer, w, x.flatten(0, 1))
    return weighted_rows(w["table/values"], rows, weights).view_as(x)


def memory_plus(layer: Any, w: Weights, x: Tensor) -> Tensor:
    gate = F.silu(x @ w["gate"] + w["gate_bias"])
    return (pkm(layer, w, x) * gate) @ w["out"] + w["out_bias"]


def peer(layer: Any, w: Weights, x: Tensor) -> Tensor:
    flat = x.flatten(0, 1)
    weights, rows = product_keys(layer, w, flat)
    inputs = F.embedding(rows, w["table/pre"].flatten(1))
    weights = weights * F.gelu(torch.einsum("nkd,nd->nk", inputs, flat))
    return weighted_rows(w["table/values"], rows, weights).view_as(x)


def ultramem_v2(layer: Any, w: Weights, x: Tensor) -> Tensor:
    """Of one head, and the first layer's window of the table."""
    flat, m, core = x.flatten(0, 1), layer.top_k, w["core"][:, 0]
    q = F.rms_norm(torch.einsum("nd,dpk->npk", flat, w["query"]), (layer.key_dim,), eps=layer.eps)
    q = q * w["query_norm"]
    keys = w["keys"][:, :, 0]  # [2, key_dim, rank, keys]
    keys = keys * torch.rsqrt(keys.square().mean(1, keepdim=True) + layer.eps)
    keys = keys * w["key_norm"][:, None, None]
    left, _, right = torch.linalg.svd(core.detach().sum(0))
    u, v = left[:, 0], right[0]
    last_u, last_v = w["u"][0], w["v"][0]
    if (u + last_u).abs().sum() + (v + last_v).abs().sum() < (
        (u - last_u).abs().sum() + (v - last_v).abs().sum()
    ):
        u, v = -u, -v

    row, column = (torch.einsum("nk,krm->nrm", q[:, p], keys[p]) for p in (0, 1))
    i = torch.einsum("nrm,r->nm", row, u).topk(m).indices
    j = torch.einsum("nrm,r->nm", column, v).topk(m).indices
    row, column = (
        s.gather(-1, at[:, None].expand(-1, layer.rank, -1)) for s, at in ((row, i), (column, j))
    )
    pairs = torch.einsum("nra,prq,nqb->npab", row, core, column).flatten(-2)
    at = pairs.sum(1).topk(m).indices
    scores = pairs.gather(-1, at[:, None].expand(-1, pairs.shape[1], -1)).mT  # [tokens, m, slices]
    ids = i.gather(-1, at // m) * layer.num_keys + j.gather(-1, at % m)
    rows = w["shuffle"].long()[ids]

    pre = F.embedding(rows, w["table/pre"].flatten(1))
    scores = scores * torch.einsum("nkd,nd->nk", pre, flat @ w["pre"])[..., None]
    values = F.embedding(rows, w["table/values"].flatten(1)).unflatten(-1, (scores.shape[-1], -1))
    y = (values * scores[..., None]).sum(1).flatten(1)
    return (y @ w["out"][0].flatten(0, 1)).view_as(x)


# --- token mixers ---------------------------------------------------------------------------------


def rotate(x: Tensor, theta: float, interleaved: bool) -> Tensor:
    """x [batch, heads, seq, channels], by the place in the sequence."""
    length, width = x.shape[-2:]
    frequencies = theta ** -(torch.arange(0, width, 2) / width)
    angles = torch.arange(length)[:, None] * frequencies
    cos, sin = angles.cos(), angles.sin()
    a, b = (x[..., 0::2], x[..., 1::2]) if interleaved else x.chunk(2, -1)
    turned = a * cos - b * sin, b * cos + a * sin
    return torch.stack(turned, -1).flatten(-2) if interleaved else torch.cat(turned, -1)


def heads(x: Tensor, w: Tensor) -> Tensor:
    """x [batch, seq, inputs] by w [inputs, heads, channels] -> [batch, heads, seq, channels]."""
    return (x @ w.flatten(1)).unflatten(-1, w.shape[1:]).transpose(1, 2)


def attention(layer: Any, w: Weights, x: Tensor) -> Tensor:
    q, k = (rotate(heads(x, w[name]), layer.rope.theta, False) for name in ("query", "key"))
    y = F.scaled_dot_product_attention(
        q, k, heads(x, w["value"]), is_causal=True, enable_gqa=layer.num_kv_heads < layer.num_heads
    )
    return y.transpose(1, 2).flatten(-2) @ w["out"].flatten(0, 1)


def mla(layer: Any, w: Weights, x: Tensor) -> Tensor:
    def norm(x: Tensor, name: str) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], w[f"{name}_norm/weight"], layer.norm_eps)

    def turned(x: Tensor) -> Tensor:
        return rotate(x, layer.rope.theta, layer.rope.interleaved)

    q = heads(norm(x @ w["query_down"], "query"), w["query"])
    q = torch.cat((q[..., : layer.nope_dim], turned(q[..., layer.nope_dim :])), -1)
    latent, shared = (x @ w["kv_down"]).split((layer.kv_rank, layer.rope_dim), -1)
    latent = norm(latent, "kv")
    k = heads(latent, w["key"])
    shared = turned(shared[:, None]).expand(-1, layer.num_heads, -1, -1)
    k = torch.cat((k, shared), -1)
    y = F.scaled_dot_product_attention(q, k, heads(latent, w["value"]), is_causal=True)
    return y.transpose(1, 2).flatten(-2) @ w["out"].flatten(0, 1)
