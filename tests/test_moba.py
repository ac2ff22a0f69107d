"""MoBA: golden vectors, an oracle, decoding, packing, causality, the linear path, sharding."""

from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bestiary.layers import MoBA

RTOL = 1e-5


def close(actual: Any, expected: Any, rtol: float = RTOL) -> None:
    expected = np.asarray(expected)
    atol = rtol * np.abs(expected).max(initial=1e-30)
    np.testing.assert_allclose(actual, expected, rtol=rtol, atol=atol)


@pytest.mark.golden("moba")
def test_golden(golden: SimpleNamespace) -> None:
    a, hp = golden.arrays, golden.hp
    starts = a["cu_seqlens"]
    heads, kv_heads, head_dim = a["q"].shape[1], a["k"].shape[1], a["q"].shape[2]
    moba = MoBA(
        dim=1,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        rope=None,
        block_size=hp["chunk_size"],
        top_k=hp["top_k"] + (not hp["top_k_includes_current"]),
        scale=hp["attention_scale"],
    )
    lengths = np.diff(starts)
    assert lengths.tolist() == hp["seq_lens"]
    segments = jnp.asarray(np.repeat(1 + np.arange(len(lengths)), lengths))[None]

    @jax.jit
    def run(q: Any, k: Any, v: Any, cotangent: Any) -> Any:
        def attend(*qkv: Any) -> Any:
            return moba.attend({}, *qkv, q_segments=segments, kv_segments=segments)

        o, pull = jax.vjp(attend, q, k, v)
        return o, *pull(cotangent)

    results = run(*(a[name][None] for name in ("q", "k", "v", "cot")))
    for name, result in zip(("o", "d_q", "d_k", "d_v"), results, strict=True):
        close(result[0], a[name])
