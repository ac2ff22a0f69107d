"""A small byte-level Llama on the text that every Python carries, minutes on a laptop."""

from bestiary.train.data import Data
from bestiary.train.experiment import Evaluation, Experiment
from bestiary.train.optimizer import Optimizer, Schedule
from bestiary.zoo.llama import llama_tiny


def experiment() -> Experiment:
    return Experiment(
        # four layers without a loop: CPUs run them a third faster, for a second more of compilation
        model=llama_tiny().unrolled(),
        data=Data(length=128, batch_size=8),
        optimizer=Optimizer(name="muon", learning_rate=0.02, adam_learning_rate=0.005),
        schedule=Schedule(decay="linear", final=0.0),
        evaluation=Evaluation(batches=100),
        minutes=2.0,
    )
