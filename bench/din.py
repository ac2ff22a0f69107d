"""Whether it helps to look at a user's history through the candidate.

    python bench/din.py --seeds 3

Trains on a synthetic log (20 topics, users who like two or three of them) or on `--path`, and
prints AUC, GAUC and the relative improvement of GAUC over sum pooling on the last choice of every
user. Adam at a constant rate, no early stop.
"""

import argparse
from typing import Any

import jax
import numpy as np
import optax

from bestiary.eval.ranking import relative_improvement
from bestiary.layers.base import Tree, update
from bestiary.train.clicks import Clicks
from bestiary.train.interactions import Interactions, Samples
from bestiary.train.step import merge, split
from bestiary.zoo.din import DIN, din

MODELS: dict[str, dict[str, Any]] = {
    "sum pooling, sigmoid": dict(normalize=None, activation="sigmoid"),
    "sum pooling, Dice": dict(normalize=None, activation="dice"),
    "sum pooling, PReLU": dict(normalize=None, activation="prelu"),
    "DIN, sigmoid": dict(normalize="none", activation="sigmoid"),
    "DIN, PReLU": dict(normalize="none", activation="prelu"),
    "DIN, Dice": dict(normalize="none", activation="dice"),
    "DIN, Dice, softmax": dict(normalize="softmax", activation="dice"),
    "DIN, Dice, scaled softmax": dict(normalize="scaled_softmax", activation="dice"),
}


def trained(
    model: DIN, loaded: Samples, objective: Clicks, steps: int, rate: float, seed: int
) -> dict[str, float]:
    """loss, auc and gauc of the validation part."""
    params, frozen = split(model.declare(), model.init(jax.random.key(seed)))
    tx = optax.adam(rate)

    def loss(params: Tree, frozen: Tree, batch: Any) -> Any:
        value, report, state = objective(model, merge(params, frozen), batch)
        return value / report["sums"]["tokens"], state

    @jax.jit
    def step(params: Tree, frozen: Tree, opt: Any, batch: Any) -> tuple[Tree, Tree, Any]:
        grads, state = jax.grad(loss, has_aux=True)(params, frozen, batch)
        updates, opt = tx.update(grads, opt, params)
        return optax.apply_updates(params, updates), update(frozen, state), opt

    opt, batches = tx.init(params), loaded.train(seed)
    for _ in range(steps):
        params, frozen, opt = step(params, frozen, opt, next(batches))
    measure, whole = jax.jit(objective.measure, static_argnums=0), merge(params, frozen)
    measured = [measure(model, whole, batch) for batch in loaded.validation()]
    return objective.summary([jax.tree.map(np.asarray, m) for m in measured])


def main() -> None:
    parser = argparse.ArgumentParser(description="DIN beside sum pooling")
    parser.add_argument("--path", help="an interaction log instead of the synthetic one")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--dim", type=int, default=16)
    parser.add_argument("--rate", type=float, default=3e-3)
    parser.add_argument("--regularization", type=float, default=0.01)
    arguments = parser.parse_args()

    objective = Clicks(regularization=arguments.regularization)
    found: dict[str, list[dict[str, float]]] = {name: [] for name in MODELS}
    for seed in range(arguments.seeds):
        loaded = Interactions(path=arguments.path, length=20, batch_size=256, seed=seed).load()
        for name, options in MODELS.items():
            model = din(
                num_items=loaded.log.num_items,
                num_categories=loaded.log.num_categories,
                dim=arguments.dim,
                **options,
            )
            result = trained(model, loaded, objective, arguments.steps, arguments.rate, seed)
            found[name].append(result)
            print(f"seed {seed}, {name}: {result}", flush=True)
    base = np.mean([result["gauc"] for result in found["sum pooling, sigmoid"]])
    print("\n| model | AUC | GAUC | over sum pooling |\n|---|---:|---:|---:|")
    for name, results in found.items():
        ranked = {key: np.array([result[key] for result in results]) for key in ("auc", "gauc")}
        cells = [f"{values.mean():.4f} ± {values.std():.4f}" for values in ranked.values()]
        gain = relative_improvement(float(ranked["gauc"].mean()), float(base))
        print(f"| {name} | {' | '.join(cells)} | {100 * gain:+.1f} % |")


if __name__ == "__main__":
    main()
