"""A small byte-level Llama on the text that every Python carries, minutes on a laptop.

Expect about 1.5 nats per byte after three minutes on two CPU cores.
"""

from bestiary.train.data import Data
from bestiary.train.experiment import Experiment
from bestiary.train.optimizer import Optimizer, Schedule
from bestiary.zoo.llama import llama_tiny


def experiment() -> Experiment:
    return Experiment(
        model=llama_tiny(),
        data=Data(length=128, batch_size=16),
        optimizer=Optimizer(name="muon", learning_rate=0.02, adam_learning_rate=0.005),
        schedule=Schedule(decay="linear", final=0.0),
        minutes=3.0,
    )
