"""Handwritten digits of 8 x 8 by a small vision transformer, a minute on a laptop.

On the 1797 images that scikit-learn ships, of which 359 are held out. Expect 97 % of these right
after 1000 steps, 45 seconds on 2 cores.
"""

from bestiary.train.classification import Classification
from bestiary.train.experiment import Checkpoints, Evaluation, Experiment
from bestiary.train.images import Images
from bestiary.train.optimizer import Optimizer, Schedule
from bestiary.zoo.vit import vit_digits


def experiment() -> Experiment:
    return Experiment(
        model=vit_digits().unrolled(),
        data=Images(),
        objective=Classification(smoothing=0.1),
        optimizer=Optimizer(learning_rate=2e-3, weight_decay=0.05),
        schedule=Schedule(warmup=0.1, final=0.0),
        checkpoints=Checkpoints(every=250),
        evaluation=Evaluation(every=250, batches=0),
        steps=1000,
        log_every=50,
    )
