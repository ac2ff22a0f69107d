"""The quickstart with Spark feed-forwards of equal parameters; about 8 % of the units are active."""

from dataclasses import replace

from bestiary.configs import quickstart
from bestiary.train.experiment import Experiment
from bestiary.zoo.spark import spark_tiny


def experiment() -> Experiment:
    model = spark_tiny()
    model = replace(model, blocks=replace(model.blocks, unroll=model.blocks.n))
    return replace(quickstart.experiment(), model=model)
