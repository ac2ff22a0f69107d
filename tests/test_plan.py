"""Plans: classes of memory, collectives and FLOPs against theory; refusals; the published zoo."""

import importlib.util
import io
import json
import re

import jax
import pytest
from rich.console import Console

from bestiary.eval import topology as tpu
from bestiary.eval.hlo import jaxpr_flops
from bestiary.eval.plan import Options, experiment_for, plan, run
from bestiary.eval.plan_programs import training_step
from bestiary.eval.plan_report import Plan, Program, print_plan
from bestiary.layers import Attention
from bestiary.layers.base import params_of
from bestiary.train.experiment import Experiment, load_experiment
from bestiary.train.mesh import Mesh, placed
from bestiary.train.tree_json import from_json, to_json
from bestiary.zoo import load_model
from bestiary.zoo.llama import llama, swiglu

pytestmark = pytest.mark.skipif(
    not importlib.util.find_spec("libtpu"), reason="libtpu is not installed: bestiary[plan]"
)

DIM, HIDDEN, VOCAB, ROWS, LENGTH = 128, 384, 512, 32, 64
FSDP, TENSOR = 4, 4


def experiment(layers: int, **options) -> Experiment:
    """float32 on v5e:4x4, one chunk of logits: theory is exact."""
    attention = Attention(dim=DIM, num_heads=8, num_kv_heads=4, head_dim=32)
    model = llama(vocab_size=VOCAB, num_layers=layers, attention=attention, ffn=swiglu(DIM, HIDDEN))
    defaults = {"batch": ROWS, "length": LENGTH, "remat": "none", "precision": "float32"}
    mesh = Mesh(data=1, fsdp=FSDP, tensor=TENSOR)
    return experiment_for(model, FSDP * TENSOR, mesh=mesh, **(defaults | options))


@pytest.fixture(scope="module")
def slice_():
    return tpu.parse("v5e:4x4")


@pytest.fixture(scope="module")
def plans(slice_) -> dict[int, Plan]:
    """By number of layers."""
    return {n: plan(experiment(n), slice_, name=f"llama of {n} layers") for n in (3, 5)}


def sums(program: Program) -> dict[tuple, tuple[int, int]]:
    """Launches and bytes of collectives by kind and axes."""
    assert program.report
    return {(c.kind, c.axes): (c.count, c.bytes) for c in program.report.collectives}


def test_collectives_of_a_layer_are_those_of_theory(plans):
    few, many = (sums(plans[n].programs[0]) for n in (3, 5))

    def of_a_layer(kind: str, axis: str) -> tuple[float, ...]:
        pair = zip(many[kind, (axis,)], few[kind, (axis,)], strict=True)
        return tuple((a - b) / 2 for a, b in pair)

    block = params_of(experiment(1).model.blocks.block.declare())
    matrices = sum(p.nbytes for p in block if p.inputs is not None)
    gains = sum(p.nbytes for p in block if p.inputs is None)
    # fsdp gathers each of the 7 matrices forwards and backwards, from what tensor leaves of it
    assert of_a_layer("all-gather", "fsdp") == (2 * 7, 2 * matrices / TENSOR)
    # Megatron: the outputs of attention and feed-forward, and the gradients of their inputs; with
    # one of them the number of units that are not zero
    activations = ROWS // FSDP * LENGTH * DIM * 4
    assert of_a_layer("all-reduce", "tensor") == (4, 4 * activations + 4)
    # gradients of matrices are scattered, or small ones reduced whole with those of the gains; and
    # how often each hidden unit is not zero
    scattered, reduced = (of_a_layer(k, "fsdp")[1] for k in ("reduce-scatter", "all-reduce"))
    assert scattered + reduced == matrices / TENSOR + gains + HIDDEN * 4 / TENSOR
    assert scattered > 0.7 * matrices / TENSOR
    # beside the layers, the head is gathered once, with its backward pass
    head = VOCAB * DIM * 4 // TENSOR
    assert many["all-gather", ("fsdp",)] == (5 * 14 + 1, 5 * 2 * matrices / TENSOR + head)


def test_memory_of_the_classes_adds_up(plans):
    result = plans[5]
    (program,) = result.programs
    declared = sum(p.nbytes for p in params_of(result.experiment.model.declare()))
    gains = (2 * 5 + 1) * DIM * 4  # too small to be split
    per_device = (declared - gains) / (FSDP * TENSOR) + gains
    assert program.memory["parameters"] == per_device
    assert program.memory["optimizer"] == 2 * per_device + 4  # two moments and a count
    assert program.memory["batch"] == 5 * ROWS * LENGTH * 4 // FSDP + 3 * 4
    assert sum(program.memory.values()) == program.needed < result.usable_bytes
    assert result.fits and program.fits and program.refusal is None


def test_memory_is_that_of_the_compiler(slice_):
    job = experiment(1)
    mesh = tpu.mesh(slice_, {"data": 1, "fsdp": FSDP, "tensor": TENSOR})
    with placed(mesh, job.mesh.table):
        task = training_step(job, mesh)
        compiled, _ = tpu.compile_for(
            mesh, task.jitted, *task.arguments, level="O0", options=tpu.NO_WINDOWED_EINSUM
        )
        traced = task.jitted.trace(*task.arguments)
    sizes = compiled.memory_analysis()
    assert sizes is not None
    (program,) = plan(job, slice_).programs
    arguments = sum(n for name, n in program.memory.items() if name != "temporaries")
    # the compiler pads heads of 32 channels to 128 lanes
    assert arguments <= sizes.argument_size_in_bytes <= 2 * arguments
    kept = sizes.output_size_in_bytes - sizes.alias_size_in_bytes
    assert program.needed == sizes.argument_size_in_bytes + kept + sizes.temp_size_in_bytes
    assert program.compiled_flops == jaxpr_flops(traced.jaxpr, "tpu")


def test_flops_are_three_forward_passes_and_remat_adds_one(plans, slice_):
    for result in plans.values():
        (program,) = result.programs
        assert (
            program.compiled_flops
            == program.model_flops
            == 3 * ROWS * LENGTH * (result.experiment.model.cost(LENGTH).flops)
        )
        assert program.six_n_flops == 6 * result.params_active * ROWS * LENGTH
    (again,) = plan(experiment(3, remat="full"), slice_).programs
    # all of the forward pass but the head and the last product of every layer
    assert again.compiled_flops is not None
    head, down = VOCAB * DIM, DIM * HIDDEN
    forward = again.model_flops / 3 - 2 * ROWS * LENGTH * (head + 3 * down)
    assert again.compiled_flops == again.model_flops + forward


def test_modelled_times_follow_from_the_counts(plans):
    result = plans[5]
    (program,) = result.programs
    modelled, chip = program.modelled, tpu.chip("v5e")
    assert modelled and program.report and program.compiled_flops
    assert modelled.seconds["compute"] == pytest.approx(program.compiled_flops / 16 / chip.flops)
    assert modelled.overlapped.seconds == pytest.approx(
        max(
            modelled.seconds["compute"],
            modelled.seconds["memory"],
            sum(modelled.seconds.values()) - sum(list(modelled.seconds.values())[:2]),
        )
    )
    assert modelled.serial.seconds >= modelled.overlapped.seconds
    rate = modelled.serial
    assert rate.tokens_per_second * rate.seconds == pytest.approx(ROWS * LENGTH)
    assert rate.mfu * rate.seconds * 16 * chip.flops == pytest.approx(program.active_flops)


def test_a_plan_survives_json_and_prints(plans):
    result = plans[3]
    assert from_json(json.loads(json.dumps(to_json(result)))) == result
    console = Console(file=io.StringIO(), width=120)
    print_plan(result, console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    for expected in ("llama of 3 layers on v5e:4x4: 16 devices", "fits", "reduce-scatter", "MFU"):
        assert expected in text
    for line in text.splitlines():
        if re.search(r"[\d.]+ (MiB|T) ", line) and "needs" not in line and "sync" not in line:
            assert line.rstrip().endswith(("compiled", "modelled")), line


def test_decoding_plans_two_programs_with_a_sharded_cache(slice_):
    prefill, step = plan(experiment(2, precision="bfloat16"), slice_, decode=True).programs
    assert (prefill.name, prefill.tokens) == ("prefill", ROWS * LENGTH)
    assert (step.name, step.tokens) == ("decode step", ROWS)
    keys = ROWS * LENGTH * 4 * 32 * 2 // (FSDP * TENSOR)  # bfloat16, over rows and heads
    index = 2 * ROWS * LENGTH * 4 // FSDP
    assert step.memory["cache"] == 2 * (2 * keys + index) + ROWS // FSDP * 4
    assert prefill.memory["cache"] == step.memory["cache"]
    model = experiment(2).model
    matrices = sum(p.size for p in params_of(model.declare()) if len(p.shape) >= 2)
    assert step.memory["parameters"] == pytest.approx(2 * matrices / 16, rel=0.02)
    assert step.compiled_flops == pytest.approx(step.model_flops)
    assert prefill.fits and step.fits


def test_what_does_not_fit_is_told_with_status_1(capsys):
    options = Options(name="llama3_2_1b", topology="v5e:1x1", length=1024, json=True)
    assert run(options) == 1
    result = from_json(json.loads(capsys.readouterr().out))
    (program,) = result.programs
    assert not result.fits and "RESOURCE_EXHAUSTED" in program.refusal
    parameters = 4 * load_model("llama3_2_1b").count().total
    assert program.memory["parameters"] == parameters
    assert program.needed > 3 * parameters and program.needed > result.usable_bytes
    assert sum(program.memory.values()) == program.needed
    assert program.report is None and program.model_flops > 0
    console = Console(file=io.StringIO(), width=120)
    print_plan(result, console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "does not fit" in text and "the compiler refused it: RESOURCE_EXHAUSTED" in text


def test_an_experiment_is_planned_as_it_would_run(capsys):
    options = Options(name="quickstart", topology="v5e:1x1", optimizer="adafactor")
    assert run(options) == 0
    text = capsys.readouterr().out
    data = load_experiment("quickstart").data
    assert f"{data.batch_size} sequences of {data.length} tokens" in text and "adafactor" in text


def test_the_cheaper_defaults_of_a_bare_model():
    job = experiment_for(load_model("llama3_8b"), 64, mesh=Mesh(data=1, fsdp=16, tensor=4))
    assert (job.data.batch_size, job.data.length, job.model.blocks.remat) == (64, 4096, "full")
    logits = 4 * 4096 * 128256 // 4 * 4  # bytes of 4 rows on a device
    assert logits / job.objective.chunks <= 2**29 < 2 * logits / job.objective.chunks


@pytest.mark.parametrize(
    "options, message",
    [
        ({"topology": "v5p"}, "'v5p' is not CHIP:LAYOUT"),
        ({"topology": "v5p-8"}, "'v5p-8' is not CHIP:LAYOUT"),
        ({"topology": ""}, "'' is not CHIP:LAYOUT"),
        ({"topology": "v9:2x2"}, "chip 'v9' is not one of"),
        ({"topology": "v5p:2x2"}, "a layout of v5p has 3 sizes"),
        ({"topology": "v5e:3x3"}, "the first two sizes must be even"),
        ({"topology": "v5e:64x64"}, "a v5e pod has 256"),
        ({"mesh": ""}, "mesh: '' is not AXIS=SIZE"),
        ({"mesh": "fsdp"}, "mesh: 'fsdp' is not AXIS=SIZE, for example fsdp=16,tensor=4"),
        ({"mesh": "fsdp=2,"}, "mesh: '' is not AXIS=SIZE"),
        ({"mesh": "fsdp=-4"}, "mesh: 'fsdp=-4' is not AXIS=SIZE"),
        ({"mesh": "fsdp=2.0"}, "mesh: 'fsdp=2.0' is not AXIS=SIZE"),
        ({"mesh": "fsdp=0,tensor=4"}, "need each axis once and at least 1"),
        ({"mesh": "fsdp=2,fsdp=2"}, "need each axis once"),
        ({"mesh": "model=4"}, "mesh: 'model' is not one of the axes data, fsdp, tensor"),
        ({"mesh": "fsdp=8"}, "must multiply to the 4 devices of v5e:2x2"),
        ({"mesh": "tensor=2"}, "has 2 devices: the sizes must multiply to the 4 devices"),
        ({"name": "nothing"}, "name: 'nothing' is no experiment or model; known: di"),
        ({"name": "llama3_2_3b", "topology": "v5e:4x4", "mesh": "tensor=16"},
         "mesh: kv_heads 8 of blocks/mixer/key does not divide over tensor=16"),
        ({"batch": 3}, "batch: 3 sequences do not divide over 4 shards"),
        ({"batch": 0}, "batch: 0; need at least 1"),
        ({"length": -1}, "length: -1; need at least 1"),
        ({"name": "quickstart", "mesh": "tensor=3,data=2"}, "must multiply to the 4 devices"),
    ],
)  # fmt: skip
def test_impossible_plans_are_refused_in_one_line(options, message):
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        run(Options(**({"name": "llama_tiny", "topology": "v5e:2x2"} | options)))
    assert "\n" not in str(error.value)


def test_flops_of_the_platform_that_is_asked_for():
    def both(x):
        return jax.lax.platform_dependent(x, tpu=lambda x: x, default=lambda x: x @ x)

    jaxpr = jax.make_jaxpr(both)(jax.numpy.ones((3, 3)))
    assert [jaxpr_flops(jaxpr, p) for p in ("tpu", "cpu", None)] == [0, 54, 54]


PUBLISHED = {
    # name: a slice that trains it, 4096 tokens; where not all of it splits the parameters (and the
    # experts), how it does
    "llama3_2_1b": ("v5e:4x4", {}),
    "llama_1b_24x2048": ("v5e:4x4", {}),
    "polycom_1b_dense": ("v5e:4x4", {}),
    "gemma2_2b": ("v5e:4x4", {}),
    "spark_gemma2_2b": ("v5e:4x4", {}),
    "llama3_2_3b": ("v5e:4x4", {}),
    "llama2_7b": ("v5e:8x8", {}),
    "gemma2_9b": ("v5e:8x8", {}),
    "ling_mini_2": ("v5e:8x8", {}),
    "mixtral_8x7b": ("v5p:4x4x4", {"fsdp": 8, "tensor": 8}),
    "olmoe_1b7b": ("v5p:4x4x4", {}),
    "sigma_moe_tiny": ("v5p:4x4x2", {}),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_fit(name):
    layout, sizes = PUBLISHED[name]
    slice_, mesh = tpu.parse(layout), Mesh(data=1, **sizes) if sizes else None
    job = experiment_for(load_model(name), len(slice_.devices), mesh=mesh)
    result = plan(job, slice_, name=name)
    (program,) = result.programs
    assert result.fits, f"{program.needed / 2**30:.1f} GiB"
    # data decide on the rounds of a mixture's exchange alone, forwards and backwards
    assert program.report and program.report.unknown_loops in (0, 2)
    # nothing that grows with the model is left whole on every device
    assert program.memory["parameters"] < 1.01 * 4 * result.params_total / len(slice_.devices)


def test_a_mixture_sends_little_more_than_its_choices(slice_):
    """5 exchanges of rows a layer: to the experts and back, and backwards rows, gradients and the
    rows' gradients; with each of the 2 ways out, ids and weights, and back weights' gradients."""
    model, devices = load_model("olmoe_tiny"), 16
    router = model.blocks.block.ffn.router
    job = experiment_for(model, devices, batch=ROWS, length=LENGTH)
    (program,) = plan(job, slice_).programs
    assert program.report and program.report.unknown_loops == 2
    choices = ROWS // devices * LENGTH * router.top_k
    rows = 1.25 * choices  # to all devices in a round, of which an even routing needs one
    expected = model.blocks.n * rows * (5 * 2 * router.dim + 5 * 4)
    sent = sums(program)["all-to-all", ("fsdp",)]
    assert sent[0] >= 10 * model.blocks.n
    assert expected <= sent[1] < 1.1 * expected


@pytest.mark.slow
def test_llama3_8b_on_64_chips():
    slice_ = tpu.parse("v5p:4x4x4")
    mesh = Mesh(data=1, fsdp=16, tensor=4)
    (program,) = plan(experiment_for(load_model("llama3_8b"), 64, mesh=mesh), slice_).programs
    assert program.fits and program.report
    kinds = sums(program)
    scattered, reduced = (kinds[k, ("fsdp",)][1] for k in ("reduce-scatter", "all-reduce"))
    assert scattered > 10 * reduced  # gradients are scattered; newer libtpu reduces the embedding's
    calls = {k: n for k, n in program.report.custom_calls.items() if "splash" in k}
    assert sum(calls.values()) == 32 * 4  # forward, again backwards, dq, dkv
