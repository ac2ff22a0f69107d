"""Clicks by a deep interest network, measured by GAUC; seconds on a laptop.

On a synthetic log of 2000 users with two or three topics each, or on any log of interactions
(`--data.path ratings.csv`); the model has room for 10,000 items and 20 categories. Expect a GAUC of
about 0.79 on the synthetic log after 600 steps, 20 seconds on 2 cores.
"""

from bestiary.train.clicks import Clicks
from bestiary.train.experiment import Checkpoints, Evaluation, Experiment
from bestiary.train.interactions import Interactions
from bestiary.train.optimizer import Optimizer, Schedule
from bestiary.zoo.din import din


def experiment() -> Experiment:
    return Experiment(
        model=din(num_items=10_000, num_categories=20, dim=16, unit_widths=(16,)),
        data=Interactions(length=20, batch_size=256),
        objective=Clicks(),
        optimizer=Optimizer(learning_rate=3e-3, weight_decay=0.0),
        schedule=Schedule(warmup=0.05, final=0.0),
        checkpoints=Checkpoints(every=200),
        evaluation=Evaluation(every=200, batches=0),
        steps=600,
        log_every=50,
    )
