"""Attention kernels: splash attention equals the reference, compiles for TPUs, and is chosen."""

import importlib.util
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bestiary.eval import topology
from bestiary.eval.hlo import analyse
from bestiary.eval.topology import compile_for
from bestiary.kernels.attention import attention, tpu
from bestiary.kernels.attention.masks import longformer
from bestiary.layers import Attention
from bestiary.layers.sharding import DEFAULT_RULES
from bestiary.train.mesh import placed

BATCH, LENGTH, HEADS, KV_HEADS, HEAD = 2, 256, 4, 2, 128

needs_libtpu = pytest.mark.skipif(
    not importlib.util.find_spec("libtpu"), reason="libtpu is not installed: bestiary[plan]"
)


def operands(length=LENGTH, head=HEAD, dtype=jnp.float32):
    shapes = [(HEADS, head), (KV_HEADS, head), (KV_HEADS, head), (HEADS, head)]
    keys = jax.random.split(jax.random.key(0), len(shapes))
    return [
        jax.random.normal(k, (BATCH, length, *s), dtype) for k, s in zip(keys, shapes, strict=True)
    ]


SEGMENTS = jnp.asarray([[0] * 100 + [1] * 156, [3] * 30 + [4] * 226])
SINKS = jnp.linspace(-1, 3, HEADS)
OPTIONS = {
    "plain": {},
    "window": {"window": 65},
    "softcap": {"softcap": 5.0, "scale": 0.2},
    "longformer": {"mask": longformer(60, (0, 130))},
    "all": {"window": 40, "softcap": 9.0, "segments": SEGMENTS, "sinks": SINKS},
}


def gradients(impl, segments=None, sinks=None, **options):
    *qkv, d_out = operands()

    def loss(q, k, v, sinks):
        segment_ids = {"q_segments": segments, "kv_segments": segments}
        y = attention(q, k, v, **segment_ids, sinks=sinks, impl=impl, **options)
        return (y * d_out).sum(), y

    argnums = (0, 1, 2) if sinks is None else (0, 1, 2, 3)
    return jax.tree.leaves(jax.jit(jax.grad(loss, argnums, has_aux=True))(*qkv, sinks))


@pytest.mark.parametrize("name", OPTIONS)
def test_splash_equals_the_reference_with_gradients(name, monkeypatch):
    interpreted = partial(tpu.make_splash_mha, interpret=True)
    monkeypatch.setattr(tpu, "make_splash_mha", interpreted)
    for ours, theirs in zip(
        gradients("tpu", **OPTIONS[name]), gradients("reference", **OPTIONS[name]), strict=True
    ):
        np.testing.assert_allclose(ours, theirs, atol=2e-5)


def test_automatic_choice_runs_here_with_gradients():
    for ours, theirs in zip(gradients("auto"), gradients("reference"), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-6)


@pytest.mark.parametrize("kv_heads", [2, 1])
def test_sharded_equals_unsharded(mesh, kv_heads):
    layer = Attention(dim=16, num_heads=4, num_kv_heads=kv_heads, head_dim=HEAD, window=50)
    params = layer.init(jax.random.key(0))
    x = jax.random.normal(jax.random.key(1), (4, 128, 16))

    def loss(params, x):
        return jnp.square(layer.apply(params, x)[0]).mean()

    expected = jax.jit(jax.value_and_grad(loss, (0, 1)))(params, x)
    with placed(mesh, DEFAULT_RULES), jax.set_mesh(mesh):
        got = jax.jit(jax.value_and_grad(loss, (0, 1)))(params, x)
    for ours, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


@pytest.mark.parametrize(
    "length, head, options, message",
    [
        (LENGTH, 64, {}, "head dimension 64 is not a multiple of 128"),
        (200, HEAD, {}, "length 200 is not a multiple of 128"),
        (LENGTH, HEAD, {"q_positions": jnp.zeros((1, LENGTH), int)}, "it has positions"),
        (LENGTH, HEAD, {"bias": jnp.zeros((1, HEADS, LENGTH))}, "takes no bias"),
    ],
)
def test_splash_says_why_it_cannot_serve(length, head, options, message):
    q, k, v, _ = operands(length, head)
    with pytest.raises(NotImplementedError, match=re.escape(message)):
        attention(q, k, v, **options, impl="tpu")


def test_cudnn_says_why_it_cannot_serve():
    q, k, v, _ = operands()
    with pytest.raises(NotImplementedError, match="soft-cap"):
        attention(q, k, v, softcap=3.0, impl="gpu")
    with pytest.raises(NotImplementedError, match="causal rows and windows"):
        attention(q, k, v, mask=longformer(8), impl="gpu")
    with pytest.raises(NotImplementedError, match="impl='gpu' cannot serve this call: ."):
        attention(q, k, v, impl="gpu")  # cuDNN is not here, or takes no float32
    with pytest.raises(ValueError, match="impl must be one of auto, reference, tpu, gpu; got 'x'"):
        attention(q, k, v, impl="x")


@needs_libtpu
@pytest.mark.parametrize("chip, head", [("v5e", 256), ("v5p", 128)])
def test_a_step_for_tpu_holds_splash_and_one_for_cpu_does_not(chip, head):
    """Gemma-2's kind of attention, sharded over rows and heads."""
    layer = Attention(dim=256, num_heads=4, num_kv_heads=2, head_dim=head, window=256, softcap=50.0)
    slice_ = topology.parse({"v5e": "v5e:2x2", "v5p": "v5p:2x2x1"}[chip])
    mesh = topology.mesh(slice_, {"data": 1, "fsdp": 2, "tensor": 2})
    loss = jax.jit(jax.grad(lambda p, x: layer.apply(p, x)[0].astype(jnp.float32).sum()))
    with placed(mesh, DEFAULT_RULES):
        params = layer.abstract(mesh)
        rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(("data", "fsdp")))
        x = jax.ShapeDtypeStruct((2, 512, 256), jnp.bfloat16, sharding=rows)
        compiled, _ = compile_for(mesh, loss, params, x, level="O0")
    text = compiled.as_text()
    assert text
    calls = analyse(text, mesh.shape).custom_calls
    kernels = {name: n for name, n in calls.items() if name.startswith("tpu_custom_call")}
    assert sum(kernels.values()) == 3, calls  # forward, dq, dkv
    here = loss.lower(layer.abstract(), jax.ShapeDtypeStruct(x.shape, x.dtype)).compile()
    assert "tpu_custom_call" not in str(here.as_text())
