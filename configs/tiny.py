"""Tiny: two layers of width 16 on short rows, to try every part of the machinery in seconds.

It learns little: expect about 3.5 nats per byte after 200 steps.
"""

from bestiary.train.data import Data
from bestiary.train.experiment import Checkpoints, Evaluation, Experiment
from bestiary.train.optimizer import Optimizer
from bestiary.zoo.llama import llama, multi_head, swiglu


def experiment() -> Experiment:
    return Experiment(
        model=llama(
            vocab_size=256,
            num_layers=2,
            attention=multi_head(16, 2),
            ffn=swiglu(16, 48),
            tied=True,
        ),
        data=Data(length=16, batch_size=8),
        optimizer=Optimizer(learning_rate=0.01),
        checkpoints=Checkpoints(every=50),
        evaluation=Evaluation(every=50, batches=20),
        steps=200,
    )
