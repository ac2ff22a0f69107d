"""The programs that a plan compiles: the training step, and prefill and decode steps."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import jax.sharding as js

from bestiary.eval import topology as tpu
from bestiary.eval.accounting import Accounting, account
from bestiary.eval.hlo import HloReport, analyse, flops_by_primitive
from bestiary.eval.plan_report import Level, Modelled, Program, Rate
from bestiary.eval.topology import Topology
from bestiary.layers.base import Array, Context, Precision, Tree, abstract
from bestiary.layers.sharding import pspec
from bestiary.train import step
from bestiary.train.experiment import Experiment, language_model


@dataclass(frozen=True, kw_only=True)
class Task:
    """A program before it is compiled: its arguments in order, by class, and what it computes."""

    name: str
    jitted: Any
    arguments: tuple[Tree, ...]
    classes: Mapping[str, Tree]
    tokens: int
    model_flops: float
    active_flops: float
    six_n_flops: float


def training_step(experiment: Experiment, mesh: js.Mesh) -> Task:
    state, batch = step.abstract_state(experiment, mesh), step.abstract_batch(experiment, mesh)
    total = jax.ShapeDtypeStruct((), jnp.int32, sharding=state["step"].sharding)
    counters = (state["step"], state["bad"], total)
    return Task(
        name="training step",
        jitted=step.make_step(experiment, mesh),
        arguments=(state, batch, total),
        classes={
            "parameters": (state["params"], state["frozen"]),
            "optimizer": state["opt"],
            "batch": (batch, counters),
        },
        **_training_work(experiment),
    )


def prefill(experiment: Experiment, mesh: js.Mesh) -> Task:
    return _advance(experiment, mesh, "prefill", language_model(experiment)[1].length)


def decode_step(experiment: Experiment, mesh: js.Mesh) -> Task:
    return _advance(experiment, mesh, "decode step", 1)


def _advance(experiment: Experiment, mesh: js.Mesh, name: str, new: int) -> Task:
    """Reads `new` tokens of every sequence into the cache and says what comes next."""
    model, data = language_model(experiment)
    compute = model.precision.compute
    model = replace(model, precision=Precision(params=compute, compute=compute))
    rows, length = data.batch_size, data.length
    cache = abstract(model.cache_spec(rows, length), mesh)
    sharding = js.NamedSharding(mesh, pspec("batch", None, mesh=mesh) or js.PartitionSpec())
    tokens = jax.ShapeDtypeStruct((rows, new), jnp.int32, sharding=sharding)
    params = model.abstract(mesh)

    def advance(params: Tree, tokens: Array, cache: Tree) -> tuple[Array, Tree]:
        x, cache, _ = model.hidden(params, tokens, Context(), cache)
        return model.logits(params, x[:, -1]), cache

    shardings = jax.tree.map(lambda leaf: leaf.sharding, cache)
    return Task(
        name=name,
        jitted=jax.jit(advance, donate_argnums=2, out_shardings=(None, shardings)),
        arguments=(params, tokens, cache),
        classes={"parameters": params, "cache": cache, "batch": tokens},
        **_work(account(model, length), rows * new, passes=1, last=new == 1),
    )


def _training_work(experiment: Experiment) -> dict[str, Any]:
    """Of all that a batch holds; backwards costs two more passes."""
    figures = account(experiment.model, experiment.data.length)
    return _work(figures, experiment.data.units, passes=3)


def _work(figures: Accounting, tokens: int, passes: int, last: bool = False) -> dict[str, Any]:
    """`tokens` of the batch, each the `last` of its row or all of them."""
    total, active = figures.forward_flops_total, figures.forward_flops_active
    if last:  # the last token meets all keys of a row, of which earlier ones skip a part
        active = figures.decode_flops_active
        total = max(total, active)
    return {
        "tokens": tokens,
        "model_flops": passes * total * tokens,
        "active_flops": passes * active * tokens,
        "six_n_flops": 2.0 * passes * figures.params_active * tokens,
    }


def compile_task(task: Task, topology: Topology, mesh: js.Mesh, level: Level) -> Program:
    memory = {name: _device_bytes(tree) for name, tree in task.classes.items()}
    needed, refusal, flops, seconds, report, modelled = 0, None, None, None, None, None
    traced = task.jitted.trace(*task.arguments)
    kernels = flops_by_primitive(traced.jaxpr, "tpu").get("pallas_call", 0)
    try:
        compiled, seconds = tpu.compile_for(
            mesh, task.jitted, *task.arguments, level=level, options=tpu.NO_WINDOWED_EINSUM
        )
    except jax.errors.JaxRuntimeError as error:
        refusal = str(error).split("\n")[0]
        needed = _needed(refusal)
        if not needed:
            raise
    else:
        sizes, text = compiled.memory_analysis(), compiled.as_text()
        assert sizes is not None and text is not None  # TPU executables have both
        needed = sizes.argument_size_in_bytes + sizes.output_size_in_bytes
        needed += sizes.temp_size_in_bytes - sizes.alias_size_in_bytes
        report = analyse(text, mesh.shape)
        flops = report.matmul_flops * mesh.size
        modelled = _model(task, report, kernels, topology, mesh)
    memory["temporaries"] = needed - sum(memory.values())
    return Program(
        name=task.name,
        tokens=task.tokens,
        memory=memory,
        needed=needed,
        fits=refusal is None and needed <= topology.chip.hbm_bytes,
        refusal=refusal,
        model_flops=task.model_flops,
        active_flops=task.active_flops,
        six_n_flops=task.six_n_flops,
        compiled_flops=flops,
        kernel_flops=kernels,
        compile_seconds=seconds,
        report=report,
        modelled=modelled,
    )


def _model(
    task: Task, report: HloReport, kernel_flops: int, topology: Topology, mesh: js.Mesh
) -> Modelled:
    seconds = tpu.roofline(report, topology, mesh)
    seconds["compute"] += kernel_flops / mesh.size / topology.chip.flops
    on_chip = max(seconds["compute"], seconds["memory"])
    collectives = sum(seconds.values()) - seconds["compute"] - seconds["memory"]

    def rate(time: float) -> Rate:
        possible = time * topology.chip.flops * mesh.size
        return Rate(
            seconds=time, tokens_per_second=task.tokens / time, mfu=task.active_flops / possible
        )

    return Modelled(
        seconds=seconds,
        overlapped=rate(max(on_chip, collectives)),
        serial=rate(on_chip + collectives),
    )


def _device_bytes(tree: Tree) -> int:
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def _needed(message: str) -> int:
    """Bytes that a refused program needs on a device, 0 when the message speaks of other things.

    libtpu says "HLO temporaries" but means the whole program, arguments and results included.
    """
    found = re.search(r"on HBM, .* required for HLO temporaries \(([\d.]+)([KMGTP]?)\)", message)
    return round(float(found[1]) * 1024 ** " KMGTP".index(found[2] or " ")) if found else 0
