"""Robust classifiers of CIFAR-10 at published scale, by PGD training and by TRADES, for a TPU host.

    python -m experiments.cifar10_robust

Settings follow those that Pang et al. 2021 (arXiv:2010.00467, section 3) found to serve PGD training (Madry et al.
2018) and TRADES (Zhang et al. 2019) alike: WRN-28-10, batches of 128, 110 epochs of gradient descent with momentum at
a rate of 0.1 that falls to a tenth after epochs 100 and 105, a weight decay of 5e-4, ten steps of 2/255 within 8/255,
shifts by up to four pixels and mirrors. What differs: statistics of BatchNorm for inference are computed from the data
afterwards, an average of the parameters is what is attacked, shifts repeat the border, and networks compute in
bfloat16.

Needs a network once, for tensorflow-datasets to fetch CIFAR-10 (160 MB). Nobody has run it to the end yet: no accuracy
is claimed. The tests run a reduced form of it.
"""

from experiments import image_robust
from experiments.image_robust import Config

EPOCH = 390  # steps

CONFIG = Config(
    workdir="runs/cifar10_robust",
    dataset="cifar10",
    trainings=("pgd", "trades"),
    steps=110 * EPOCH,
    decays=(100 * EPOCH, 105 * EPOCH),
    batch_size=128,
    learning_rate=0.1,
    ema=0.995,
    shift=4,
    flip=True,
    bfloat16=True,
    log_every=100,
    save_every=2000,
)


def main() -> None:
    """Runs the command line."""
    image_robust.command_line(__doc__, "cifar10_robust", CONFIG)


if __name__ == "__main__":
    main()
