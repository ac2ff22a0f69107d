"""NSA: golden vectors, an oracle, decoding, packing, causality, the linear path, sharding."""

from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bestiary.layers import NSA, MeanPool

RTOL = 1e-5


def close(actual: Any, expected: Any, rtol: float = RTOL, name: str = "") -> None:
    expected = np.asarray(expected)
    atol = rtol * np.abs(expected).max(initial=1e-30)
    np.testing.assert_allclose(actual, expected, rtol=rtol, atol=atol, err_msg=name)


def numbers(nsa: NSA, blocks: Any, choice: jax.Array, places: jax.Array) -> np.ndarray:
    """The numbers of the chosen blocks in their documents, ascending, the own one with them."""
    batch, length, kv_heads, _ = choice.shape
    block = np.broadcast_to(blocks.place // nsa.block_size, (batch, blocks.place.shape[1]))
    rows = np.arange(batch)[:, None, None, None]
    others = np.where(choice >= 0, block[rows, np.maximum(choice, 0)], -1)
    own = np.broadcast_to(places // nsa.block_size, (batch, length))[:, :, None, None]
    own = np.broadcast_to(own, (batch, length, kv_heads, 1))
    return np.sort(np.concatenate((others, own), -1), -1)


@pytest.mark.golden("nsa")
def test_golden(golden: SimpleNamespace) -> None:
    a, hp = golden.arrays, golden.hp
    head_dim, width = hp["head_dim"], max(hp["head_dim"], hp["v_head_dim"])
    assert hp["compression"] == "mean_pool"
    nsa = NSA(
        dim=1,
        num_heads=hp["num_attention_heads"],
        num_kv_heads=hp["num_key_value_heads"],
        head_dim=width,
        rope=None,
        block_size=hp["block_size"],
        num_selected=hp["num_selected_blocks"],
        local_window=hp["window_size"] + (hp["window_size"] and not hp["window_includes_self"]),
        compression=MeanPool(),
        scale=hp["attention_scale"],
    )

    def widened(x: Any) -> Any:  # zeros add nothing to products and results
        return jnp.pad(x, ((0, 0),) * 3 + ((0, width - x.shape[-1]),))

    names = ("q", "k", "v", "g_cmp", "g_slc", "g_swa")
    params = {"compress_key": {}, "compress_value": {}}

    @jax.jit
    def run(operands: tuple, cotangent: jax.Array) -> Any:
        def attend(q: Any, k: Any, v: Any, *gates: Any) -> Any:
            q, k, wide = widened(q), widened(k), widened(v)
            given = params | {"gates": jnp.stack(gates, -1)}
            return nsa.attend(given, q, k, wide)[..., : v.shape[-1]]

        o, pull = jax.vjp(attend, *operands)
        q, k, v = (widened(x) for x in operands[:3])
        return o, pull(cotangent), nsa.branches(params, q, k, v)

    o, grads, branches = run(tuple(a[name] for name in names), a["cot"])
    close(o, a["o"], name="o")
    for name, grad in zip(names, grads, strict=True):
        close(grad, a[f"d_{name}"], name=f"d_{name}")
    v_head_dim = hp["v_head_dim"]
    for name, branch in (("cmp", branches.compressed), ("slc", branches.chosen)):
        close(a[f"g_{name}"][..., None] * branch[..., :v_head_dim], a[f"o_{name}"], name=name)
    chosen = numbers(nsa, branches.blocks, branches.choice, np.arange(a["q"].shape[1])[None])
    unused = hp["unused_block_index"]
    expected = np.sort(np.where(a["block_idx_sorted"] == unused, -1, a["block_idx_sorted"]), -1)
    np.testing.assert_array_equal(chosen, expected)
    assert head_dim == a["q"].shape[-1]
