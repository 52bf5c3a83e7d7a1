"""Contrastive learning of real handwritten digits, 8 x 8, without their labels, in minutes on two CPU cores.

    python -m experiments.digits_contrastive

The data come with scikit-learn, so no network is needed. The run measures itself: linear classifiers learn from the
features and 1 %, 10 % or all of the labels, beside the same on raw pixels and on the features of an untrained network;
map.png shows held-out images as points, by pixels and by features. Stop it with Ctrl-C, and the same command goes on
from there.
"""

from experiments import image_contrastive
from experiments.image_contrastive import Config

CONFIG = Config(
    workdir="runs/digits_contrastive",
    dataset="digits",
    steps=1500,
    batch_size=256,
    learning_rate=2e-3,
    ema=0.99,
    optimiser="adamw",
    warmup=100,
    area=0.3,
    flip=0.0,
    grey=0.0,
    blocks=(1, 1, 1),
    bottleneck=False,
    width=24,
    norm="group",
    head=(128, 64),
    neighbours=20,
)


def main() -> None:
    """Runs the command line."""
    image_contrastive.command_line(__doc__, "digits_contrastive", CONFIG)


if __name__ == "__main__":
    main()
