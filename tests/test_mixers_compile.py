"""Decoders of other token mixers as TPU programs: one training step of each."""

import importlib.util

import pytest

from bestiary.eval import topology as tpu
from bestiary.eval.compare_mixers import mixing
from bestiary.eval.plan import experiment_for, plan
from bestiary.zoo.llama import swiglu

pytestmark = pytest.mark.skipif(
    not importlib.util.find_spec("libtpu"), reason="libtpu is not installed: bestiary[plan]"
)
DIM, SPAN, LENGTH = 64, 16, 1024


@pytest.mark.parametrize("name", ["mamba2", "nsa", "moba"])
def test_a_training_step_compiles(name: str) -> None:
    """Of one layer, on rows long enough for attention to take its linear path."""
    model = mixing(name, DIM, 1, swiglu(DIM, 128), SPAN)
    experiment = experiment_for(model, 1, length=LENGTH, remat="none")
    (step,) = plan(experiment, tpu.parse("v5e:1x1")).programs
    assert step.refusal is None and step.fits
    assert step.compiled_flops is not None
    # forward, and twice that or more backwards, but for choices, which have no gradient
    assert step.compiled_flops > 0.9 * step.model_flops
