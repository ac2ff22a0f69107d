"""Deep Interest Network: golden vectors, a float64 oracle, padding, regularisation, learning."""

import re
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from arrays import close, draw

from bestiary.eval.ranking import gauc
from bestiary.layers import Dice, LocalActivationUnit, Perceptron, Relu, Sigmoid, SumPooling
from bestiary.layers.base import update
from bestiary.train.clicks import Clicks
from bestiary.train.interactions import Interactions
from bestiary.train.step import merge, split
from bestiary.zoo.din import DIN, din, din_electronics, minibatch_aware

RTOL = 1e-5


# --- the local activation unit --------------------------------------------------------------------


@pytest.mark.golden("din_local_activation")
def test_golden(golden: SimpleNamespace) -> None:
    a, hp = golden.arrays, golden.hp
    assert hp["activation"] == "sigmoid"
    widths = tuple(hp["hidden_sizes"])
    options = dict(dim=hp["embedding_dim"], widths=widths, activations=(Sigmoid(),) * len(widths))
    unit = LocalActivationUnit(
        **options, normalize="softmax" if hp["weight_normalization"] else "none"
    )

    def tree(kind: str) -> Any:
        """The reference's weights or gradients in our names."""
        linears = [f"{kind}/local_att.dnn.linears.{i}" for i in range(len(widths))]
        linears.append(f"{kind}/local_att.dense")
        rest = {
            f"linear_{i}": {"weight": a[f"{name}.weight"].T, "bias": a[f"{name}.bias"]}
            for i, name in enumerate(linears[1:])
        }
        rest |= {f"activation_{i}": {} for i in range(len(widths) - 1)}
        first = {"first": a[f"{linears[0]}.weight"].T, "first_bias": a[f"{linears[0]}.bias"]}
        return first | {"activation": {}, "rest": rest}

    query, keys, params = a["query"][:, 0], a["keys"], tree("w")
    mask = np.arange(hp["seq_len"]) < a["keys_length"]

    @jax.jit
    def run(params: Any, query: Any, keys: Any, cotangent: Any) -> Any:
        y, pull = jax.vjp(lambda *xs: unit.apply(*xs, mask)[0], params, query, keys)
        return y, unit.scores(params, query, keys, mask)[0], *pull(cotangent)

    y, scores, grads, grad_query, grad_keys = run(params, query, keys, a["cotangent"][:, 0])
    close(y, a["y"][:, 0], RTOL)
    close(scores, a["scores"][..., 0], RTOL)
    jax.tree.map(lambda x, expected: close(x, expected, RTOL), grads, tree("g"))
    close(grad_query, a["grad_query"][:, 0], RTOL)
    close(grad_keys, a["grad_keys"], RTOL)
    scaled = LocalActivationUnit(**options, normalize="scaled_softmax")
    assert hp["tf_head_scale"] == pytest.approx(scaled.dim**-0.5)
    close(scaled.apply(params, query, keys, mask)[0], a["y_tf_softmax_scaled"][:, 0], RTOL)


@pytest.mark.parametrize("normalize", ["none", "softmax", "scaled_softmax"])
def test_padding_counts_nowhere(normalize: Any) -> None:
    """Neither in values nor in gradients nor in statistics; no history at all gives 0."""
    unit = LocalActivationUnit(dim=3, widths=(4,), activations=(Dice(dim=4),), normalize=normalize)
    params, rng = draw(unit), np.random.default_rng(0)
    params["activation"]["norm"]["var"] = jnp.ones(4)
    query, keys = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((2, 3), (2, 5, 3)))
    mask = jnp.array([[True, True, False, True, False], [False] * 5])

    @jax.jit
    def run(keys: Any, mask: Any) -> Any:
        def value(params: Any, query: Any, keys: Any) -> Any:
            y, aux = unit.apply(params, query, keys, mask, training=True)
            return jnp.sin(y).sum(), (y, aux.state)

        grads, (y, state) = jax.grad(value, (0, 1, 2), has_aux=True)(params, query, keys)
        return y, state, grads

    y, state, grads = run(keys, mask)
    assert not np.asarray(y[1]).any()
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))
    other = run(jnp.where(mask[..., None], keys, 1e3), mask)
    jax.tree.map(lambda a, b: close(a, b, RTOL), (y, state, grads[:2]), (*other[:2], other[2][:2]))
    keys, mask = keys[:1, [0, 1, 3]], jnp.ones((1, 3), bool)  # the same without padding
    alone, _ = unit.apply(params, query[:1], keys, mask, training=True)
    close(alone, y[:1])


def test_the_split_product_saves_flops() -> None:
    """No array of the size of the concatenation is made, and the declared cost is what is left."""
    unit = LocalActivationUnit(dim=16, widths=(80, 40), activations=(Sigmoid(),) * 2)
    params = unit.init(jax.random.key(0))
    shapes = (jnp.zeros((8, 16)), jnp.zeros((8, 50, 16)), jnp.ones((8, 50), bool))
    jaxpr = str(jax.make_jaxpr(lambda *x: unit.apply(params, *x)[0])(*shapes))
    assert "50,64]" not in jaxpr
    assert unit.cost(50).flops == 2 * (2 * 16 * 80 + 80 * 40 + 40 + 16)


# --- the network ----------------------------------------------------------------------------------

SMALL: dict[str, Any] = dict(
    num_items=9, num_categories=4, dim=3, unit_widths=(5,), head_widths=(6,)
)


def small_batch(rng: np.random.Generator, rows: int = 6, length: int = 4) -> dict[str, Any]:
    history = rng.integers(1, 10, (rows, length))
    history[np.arange(length) < rng.integers(0, length + 1, (rows, 1))] = 0
    categories = np.append(0, rng.integers(1, 5, 9))
    item = rng.integers(1, 10, rows)
    return {
        "item": item,
        "category": categories[item],
        "history": history,
        "history_category": categories[history],
    }


@pytest.mark.parametrize("head_norm", ["affine", "batch"])
@pytest.mark.parametrize("training", [False, True])
def test_equals_the_oracle(head_norm: Any, training: bool) -> None:
    """In float64, sample by sample, with the concatenated input of the unit."""
    model = din(**SMALL, activation="sigmoid", head_norm=head_norm)
    params, batch = draw(model), small_batch(np.random.default_rng(3))
    for name in ("interest_norm", "head_norm"):
        params[name]["var"] = jnp.abs(params[name]["var"])
    p = jax.tree.map(np.float64, params)

    def embed(item: Any, category: Any) -> np.ndarray:
        return np.concatenate([p["items"]["table"][item], p["categories"]["table"][category]], -1)

    def sigmoid(x: Any) -> Any:
        return 1 / (1 + np.exp(-x))

    def norm(name: str, x: np.ndarray) -> np.ndarray:
        q, by_batch = p[name], training and head_norm == "batch"
        mean, var = (x.mean(0), x.var(0)) if by_batch else (q["mean"], q["var"])
        return (x - mean) / np.sqrt(var + 1e-3) * q["weight"] + q["bias"]

    q, k = (
        embed(batch["item"], batch["category"]),
        embed(batch["history"], batch["history_category"]),
    )
    u, unit = np.zeros_like(q), p["pooling"]
    for i in range(len(q)):
        for t in np.flatnonzero(batch["history"][i]):
            x = np.concatenate([q[i], k[i, t], q[i] - k[i, t], q[i] * k[i, t]])
            h = sigmoid(x @ unit["first"] + unit["first_bias"])
            last = unit["rest"]["linear_0"]
            u[i] += (h @ last["weight"] + last["bias"]) * k[i, t]
    u = norm("interest_norm", u) @ p["interest"]["weight"] + p["interest"]["bias"]
    x, head = norm("head_norm", np.concatenate([u, q, u * q], 1)), p["head"]
    h = sigmoid(x @ head["linear_0"]["weight"] + head["linear_0"]["bias"])
    expected = (h @ head["linear_1"]["weight"] + head["linear_1"]["bias"])[:, 0]
    expected += p["item_bias"][batch["item"]]
    y, aux = jax.jit(model.apply, static_argnums=2)(params, batch, training)
    close(y, expected)
    assert bool(aux.state) == (training and head_norm == "batch")


def test_published_size() -> None:
    model = din_electronics()
    tables = 63_002 * 64 + 802 * 64 + 63_002
    unit = 512 * 80 + 80 + 80 * 40 + 40 + 40 + 1 + 3 * 120  # Dice: alpha and two statistics
    head = 384 * 80 + 80 + 80 * 40 + 40 + 40 + 1 + 3 * 120
    norms = 4 * 128 + 4 * 384
    assert model.count().total == tables + unit + head + norms + 128 * 128 + 128


def test_minibatch_aware_regularisation() -> None:
    """w_j / n_j for each id of the batch, once however often it occurs; padding none."""
    rng = np.random.default_rng(1)
    table = jnp.asarray(rng.normal(size=(8, 3)), jnp.float32)
    n = jnp.array([9, 1, 2, 3, 4, 5, 6, 7], jnp.float32)
    ids = jnp.array([[3, 5, 3], [0, 7, 3]])
    value, grad = jax.jit(jax.value_and_grad(minibatch_aware))(table, ids, n[ids])
    expected = np.zeros((8, 3))
    for j in (3, 5, 7):
        expected[j] = np.asarray(table[j]) / float(n[j])
    close(grad, expected)
    close(value, 0.5 * (expected * np.asarray(table)).sum())
    # the objective's penalty adds those of both tables
    model, batch = din(**SMALL), small_batch(rng)
    params, counts = draw(model), np.arange(1, 11, dtype=np.float32)
    batch |= {f"{name}_count": counts[x] for name, x in list(batch.items())}
    total = 0.0
    for name, ids in (
        ("items", [batch["item"], batch["history"]]),
        ("categories", [batch["category"], batch["history_category"]]),
    ):
        rows = np.unique(np.concatenate([np.ravel(x) for x in ids]))
        rows = rows[rows > 0]
        w = np.asarray(params[name]["table"], np.float64)[rows]
        total += 0.5 * ((w**2).sum(1) / counts[rows]).sum()
    close(jax.jit(Clicks().penalty, static_argnums=0)(model, params, batch), total)


def trained(model: DIN, data: Interactions, steps: int, objective: Clicks) -> float:
    """GAUC of the validation part after Adam."""
    loaded = data.load()
    params, frozen = split(model.declare(), model.init(jax.random.key(0)))
    tx = optax.adam(3e-3)

    def loss(params: Any, frozen: Any, batch: Any) -> Any:
        value, report, state = objective(model, merge(params, frozen), batch)
        return value / report["sums"]["tokens"], state

    @jax.jit
    def step(params: Any, frozen: Any, opt: Any, batch: Any) -> Any:
        grads, state = jax.grad(loss, has_aux=True)(params, frozen, batch)
        updates, opt = tx.update(grads, opt, params)
        return optax.apply_updates(params, updates), update(frozen, state), opt

    opt, batches = tx.init(params), loaded.train(seed=0)
    for _ in range(steps):
        params, frozen, opt = step(params, frozen, opt, next(batches))
    measure = jax.jit(objective.measure, static_argnums=0)
    whole = merge(params, frozen)
    measured = [measure(model, whole, batch) for batch in loaded.validation()]
    summary = objective.summary([jax.tree.map(np.asarray, m) for m in measured])
    users, labels, logits = (
        np.concatenate([np.asarray(m[name]) for m in measured])
        for name in ("user", "labels", "logits")
    )
    real = np.concatenate([np.asarray(m["weights"]) for m in measured]) > 0
    assert summary["gauc"] == pytest.approx(gauc(users[real], labels[real], logits[real]))
    return summary["gauc"]


def test_learns_what_users_like() -> None:
    """Statistics of Dice have moved, and the synthetic log's topics are found."""
    data = Interactions(length=20, batch_size=256)
    model = din(num_items=1000, num_categories=5, dim=8, unit_widths=(16,), head_widths=(16,))
    assert trained(model, data, 300, Clicks()) > 0.75


@pytest.mark.parametrize(
    "build, message",
    [
        (
            lambda: LocalActivationUnit(dim=3, widths=(4, 5), activations=(Relu(),)),
            "activations: 1 for widths (4, 5); need at least one width, and one activation for "
            "each",
        ),
        (
            lambda: LocalActivationUnit(
                dim=3, widths=(4,), activations=(Relu(),), normalize="mean"
            ),
            "normalize: 'mean'; need one of none, softmax, scaled_softmax",
        ),
        (lambda: din(num_items=0), "num_items: 0; need at least 1"),
        (
            lambda: din(num_items=3, num_categories=-1),
            "num_categories: -1; need 0 or more",
        ),
        (
            lambda: din(num_items=3, activation="relu"),
            "activation: 'relu'; need one of dice, prelu, sigmoid",
        ),
        (
            lambda: din(num_items=3, head_norm="layer"),
            "head_norm: 'layer'; need one of affine, batch",
        ),
        (
            lambda: DIN(
                num_items=3,
                dim=4,
                pooling=SumPooling(),
                head=Perceptron(widths=(4, 1), activations=()),
            ),
            "head: from 4 to 1; need 12 to 1",
        ),
        (
            lambda: Clicks(regularization=-1.0),
            "objective.regularization: -1.0; need 0 or more",
        ),
    ],
)
def test_refuses(build: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        build()
