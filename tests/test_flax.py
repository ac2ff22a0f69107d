"""Layers inside other people's Flax programs: same numbers, metadata, training."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx
from jax.sharding import PartitionSpec as P

from bestiary.layers import (
    DEFAULT_RULES,
    GLU,
    Attention,
    Aux,
    Context,
    Layer,
    Linear,
    Param,
    PolyNorm,
    Repeat,
    RMSNorm,
    Router,
    Silu,
    SparkFFN,
    layer,
    use_rules,
)
from bestiary.layers.base import flatten, is_param
from bestiary.layers.flax import LinenLayer, NnxLayer, State, logical_rules
from bestiary.zoo.decoder import Block

DIM = 12
SPARK = SparkFFN(dim=DIM, hidden=30, predictor_dim=5, top_k=6)
ATTENTION = Attention(dim=DIM, num_heads=4, num_kv_heads=2, head_dim=6)
BLOCK = Block(mixer=ATTENTION, ffn=SPARK, norm=RMSNorm(dim=DIM))


@layer
class Centre(Layer):
    """A feed-forward with non-trained state: subtracts a running mean from x W."""

    def spec(self) -> Any:
        mean = Param((DIM,), ("embed",), trainable=False)
        return {"linear": Linear(inputs=DIM, outputs=DIM), "statistics": {"mean": mean}}

    def apply(self, params: Any, x: jax.Array) -> tuple[jax.Array, Aux]:
        y = Linear(inputs=DIM, outputs=DIM).apply(params["linear"], x)
        mean = params["statistics"]["mean"]
        following = 0.5 * mean + 0.5 * y.mean((0, 1))
        return y - mean, Aux(state={"statistics": {"mean": following}})


LAYERS = {
    "norm": RMSNorm(dim=DIM),
    "activation": PolyNorm(),
    "empty": Silu(),
    "linear": Linear(inputs=DIM, outputs=7, bias=True),
    "feed_forward": GLU(dim=DIM, hidden=20, activation=Silu()),
    "spark": SPARK,
    "mixer": ATTENTION,
    "repeat": Repeat(block=BLOCK, n=3),
    "state": Centre(),
}
every_layer = pytest.mark.parametrize("pure", LAYERS.values(), ids=LAYERS)


def inputs(batch: int = 2) -> jax.Array:
    return jnp.asarray(np.random.default_rng(0).normal(size=(batch, 5, DIM)), jnp.float32)


def equal(a: Any, b: Any) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


@every_layer
def test_nnx_gives_the_numbers_of_the_pure_form(pure: Layer) -> None:
    module = NnxLayer(pure, rngs=nnx.Rngs(params=3))
    params = nnx.as_pure(module.weights)
    equal(params, pure.init(nnx.Rngs(params=3).params()))
    equal(jax.jit(pure.apply)(params, inputs()), nnx.jit(lambda m, x: m(x))(module, inputs()))


@every_layer
def test_linen_gives_the_numbers_of_the_pure_form(pure: Layer) -> None:
    module = LinenLayer(pure)
    variables = jax.jit(module.init)(jax.random.key(3), inputs())
    raw = linen.unbox(variables)
    output = jax.jit(module.apply)(variables, inputs())
    equal(jax.jit(module.apply)(raw, inputs()), output)
    params = raw.get("params", {})
    if "state" in raw:
        params = params | raw["state"]
    equal(jax.jit(pure.apply)(params, inputs()), output)
    # a tree drawn by the pure form serves as it is
    if "state" not in raw:
        mine = pure.init(jax.random.key(4))
        equal(
            jax.jit(pure.apply)(mine, inputs()), jax.jit(module.apply)({"params": mine}, inputs())
        )


@every_layer
def test_metadata_are_the_logical_axes(pure: Layer) -> None:
    axes = [p.axes for p in jax.tree.leaves(pure.declare(), is_leaf=is_param)]
    module = NnxLayer(pure, rngs=nnx.Rngs(0))
    variables = jax.tree.leaves(module.weights, is_leaf=lambda v: isinstance(v, nnx.Variable))
    assert [v.get_metadata()["out_sharding"] for v in variables] == axes

    with nnx.logical_axis_rules(logical_rules(DEFAULT_RULES)):
        specs = nnx.get_partition_spec(nnx.state(module))
    for path, spec in nnx.to_flat_state(specs):
        del path
        assert all(a is None or a in ("data", "fsdp", "tensor") for a in spec.get_value() or ())

    boxed = jax.eval_shape(LinenLayer(pure).init, jax.random.key(0), inputs())
    specs = linen.get_partition_spec(boxed.get("params", {}))
    for path, spec in flatten(specs):
        declared = pure.declare()
        for name in path.split("/") if path else ():
            declared = declared[name]
        if is_param(declared) and declared.trainable:
            assert tuple(spec) == declared.axes


def test_linen_metadata_place_by_flax_rules(mesh: jax.sharding.Mesh) -> None:
    module = LinenLayer(Linear(inputs=16, outputs=24))
    x = jnp.zeros((2, 16))
    logical = linen.get_partition_spec(jax.eval_shape(module.init, jax.random.key(0), x))
    shardings = linen.logical_to_mesh_sharding(logical, mesh, logical_rules(DEFAULT_RULES))
    assert shardings["params"]["weight"].spec == P("fsdp", "tensor")


def test_nnx_weights_are_born_sharded(mesh: jax.sharding.Mesh) -> None:
    with jax.set_mesh(mesh), use_rules(DEFAULT_RULES):
        module = NnxLayer(GLU(dim=16, hidden=24, activation=Silu()), rngs=nnx.Rngs(0), mesh=mesh)
    up = module.weights["up"]
    assert up[...].sharding.spec == up.get_metadata()["out_sharding"] == P("fsdp", "tensor")


class Regressor(nnx.Module):
    """Somebody's model."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.embed = nnx.Linear(DIM, DIM, rngs=rngs)
        self.spark = NnxLayer(SPARK, rngs=rngs)
        self.centre = NnxLayer(Centre(), rngs=rngs)
        self.head = nnx.Linear(DIM, 1, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.embed(x)
        y, _ = self.spark(x)
        y, _ = self.centre(x + y)
        return self.head(y)[..., 0]


def target(x: jax.Array) -> jax.Array:
    return jnp.sin(x[..., 0]) * x[..., 1]


def test_a_hand_written_nnx_model_trains() -> None:
    model = Regressor(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)
    x = inputs(16)

    @nnx.jit
    def step(model: Regressor, optimizer: nnx.Optimizer, x: jax.Array) -> jax.Array:
        def loss(model: Regressor) -> jax.Array:
            return jnp.square(model(x) - target(x)).mean()

        value, grads = nnx.value_and_grad(loss)(model)
        optimizer.update(model, grads)
        return value

    before = jax.tree.map(jnp.copy, nnx.as_pure(nnx.state(model)))
    losses = [float(step(model, optimizer, x)) for _ in range(30)]
    assert losses[-1] < 0.5 * losses[0]
    after = nnx.as_pure(nnx.state(model))
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), before, after)
    assert all(jax.tree.leaves(moved)), moved


def test_nnx_state_moves_in_training_only() -> None:
    module = NnxLayer(Centre(), rngs=nnx.Rngs(0))
    mean = module.weights["statistics"]["mean"]
    assert isinstance(mean, State) and not isinstance(mean, nnx.Param)
    call = nnx.jit(lambda m, x: m(x)[1].state["statistics"]["mean"])
    np.testing.assert_array_equal(call(module, inputs()), mean[...])
    module.eval()
    frozen = np.asarray(mean[...])
    assert (call(module, inputs()) != frozen).any()
    np.testing.assert_array_equal(mean[...], frozen)


def test_a_call_is_a_step_of_the_selection_bias() -> None:
    router = Router(dim=DIM, num_experts=5, top_k=2, score="sigmoid", bias="sign", bias_rate=0.5)
    expected = -0.5 * np.sign(load(router) - load(router).mean())
    module = NnxLayer(router, rngs=nnx.Rngs(0))
    nnx.jit(lambda m, x: m(x)[0])(module, inputs())
    np.testing.assert_array_equal(module.weights["bias"][...], expected)
    assert not module.weights["load"][...].any()
    linen_module = LinenLayer(router)
    variables = linen.unbox(linen_module.init(jax.random.key(0), inputs()))
    _, changed = linen_module.apply(variables, inputs(), mutable=["state"])
    assert np.abs(changed["state"]["bias"]).max() == 0.5 and not changed["state"]["load"].any()


def load(router: Router) -> np.ndarray:
    """How many of the inputs go to each expert, with the parameters that nnx draws."""
    params = router.init(nnx.Rngs(0).params())
    return np.bincount(np.ravel(router.apply(params, inputs())[0].experts), minlength=5)


def test_nnx_state_survives_split_and_merge() -> None:
    module = NnxLayer(Repeat(block=BLOCK, n=3), rngs=nnx.Rngs(0))
    definition, state = nnx.split(module)
    equal(nnx.merge(definition, state)(inputs()), module(inputs()))


class LinenRegressor(linen.Module):
    """The same in linen."""

    @linen.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = linen.Dense(DIM)(x)
        y, _ = LinenLayer(SPARK)(x)
        y, _ = LinenLayer(Centre())(x + y)
        return linen.Dense(1)(y)[..., 0]


def test_a_hand_written_linen_model_trains() -> None:
    model, tx, x = LinenRegressor(), optax.adam(1e-2), inputs(16)
    variables = linen.unbox(jax.jit(model.init)(jax.random.key(0), x))
    params, state = variables["params"], variables["state"]
    opt_state = jax.jit(tx.init)(params)

    @jax.jit
    def step(params: Any, state: Any, opt_state: Any) -> tuple:
        def loss(params: Any) -> tuple[jax.Array, Any]:
            y, changed = model.apply({"params": params, "state": state}, x, mutable=["state"])
            return jnp.square(y - target(x)).mean(), changed["state"]

        (value, following), grads = jax.value_and_grad(loss, has_aux=True)(params)
        updates, opt_state_ = tx.update(grads, opt_state, params)
        return value, optax.apply_updates(params, updates), following, opt_state_

    before, losses = (params, state), []
    for _ in range(30):
        value, params, state, opt_state = step(params, state, opt_state)
        losses.append(float(value))
    assert losses[-1] < 0.5 * losses[0]
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), before, (params, state))
    assert all(jax.tree.leaves(moved)), moved


def test_the_cache_passes_through() -> None:
    module, x = NnxLayer(ATTENTION, rngs=nnx.Rngs(0)), inputs()
    full, _, _ = nnx.jit(lambda m, x: m(x))(module, x)

    @nnx.jit
    def run(module: NnxLayer, x: jax.Array) -> jax.Array:
        cache, outputs = module.layer.init_cache(2, 5), []
        for t in range(5):
            ctx = Context(positions=jnp.full((2, 1), t))
            y, cache, _ = module(x[:, t : t + 1], ctx, cache)
            outputs.append(y)
        return jnp.concatenate(outputs, 1)

    np.testing.assert_allclose(run(module, x), full, rtol=1e-5, atol=1e-5)
