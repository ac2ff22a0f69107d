"""`bestiary convert`: a trained mixture of experts becomes one of latent experts."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from bestiary.train.checkpoint import load_run, save_run
from bestiary.train.experiment import language_model
from bestiary.train.tree_json import to_json
from bestiary.zoo import mole


@dataclass(frozen=True, kw_only=True)
class Convert:
    """Makes a run of latent experts (MoLE, arXiv 2503.23100) of a run with mixtures of experts.

    Says of every layer how much of its gate and up projections is lost, and whether they meet the
    condition to lose nothing: that the matrices of a group read from one space of `latent`
    dimensions. The new run can be evaluated, trained on and generated from.
    """

    run: Annotated[str, tyro.conf.Positional]
    """The run directory; its experts must be gated and drop no token."""
    group_size: int
    """Experts that share a latent space: a divisor of their number."""
    latent: int
    """Dimensions of that space."""
    to: Literal["latent-experts"] = "latent-experts"
    """What the mixtures become."""
    expert_rank: int | None = None
    """First replaces every expert's matrices by their best approximations of this rank, which may
    bring them nearer to the condition (the paper's first phase)."""
    step: int | None = None
    """The checkpoint, by its step; by default the newest."""
    out: str | None = None
    """The run directory to make; RUN-latent when absent."""


def run(options: Convert) -> None:
    """`bestiary convert`. Raises ValueError when the run cannot be read or has no such mixtures,
    for impossible sizes, and when `out` exists."""
    out = Path(options.out or f"{options.run.rstrip('/')}-latent")
    if out.exists():
        raise ValueError(f"out: {out} exists already; need a new folder")
    experiment, params = load_run(options.run, options.step)
    model, _ = language_model(experiment)
    before = model.count()
    model, params, report = mole.convert(
        model,
        params,
        options.group_size,
        options.latent,
        expert_rank=options.expert_rank,
    )
    print(*mole.lines(report), sep="\n")
    experiment = dataclasses.replace(experiment, model=model, run_dir=str(out))
    save_run(out, experiment, params)
    lost = {
        place: {name: float(f.error.sum() / f.energy.sum()) for name, f in factors.items()}
        for place, factors in report.items()
    }
    record = to_json(options) | {"out": str(out), "lost": lost}
    (out / "convert.json").write_text(json.dumps(record, indent=2) + "\n")
    after = model.count()
    print(
        f"{out}: {after.total:,} parameters of {before.total:,}, "
        f"{after.active:,} active of {before.active:,}"
    )
