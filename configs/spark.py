"""The quickstart with Spark feed-forwards of equal parameters: 7 % of the units are active."""

from dataclasses import replace

from bestiary.configs import quickstart
from bestiary.train.experiment import Experiment
from bestiary.zoo.spark import spark_tiny


def experiment() -> Experiment:
    return replace(quickstart.experiment(), model=spark_tiny().unrolled())
