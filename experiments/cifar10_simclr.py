"""SimCLR on CIFAR-10 at its published scale, for a TPU host.

    python -m experiments.cifar10_simclr

Settings follow SimCLR's on CIFAR-10 (Chen et al. 2020, arXiv:2002.05709, appendix B.9, and the command that its authors
publish): a ResNet-50 that begins with a 3 x 3 convolution and no pooling, a head of one hidden layer, views without
blur and of half the strength, temperature 0.5, 1,000 epochs in batches of 512, LARS of rate 1.0 x 512 / 256 with ten
epochs of warm-up and a weight decay of 1e-4. What differs: statistics of BatchNorm are the global batch's, those for
inference are computed from the data afterwards, and all but embeddings, losses and statistics compute in bfloat16.

Linear classifiers are fitted to frozen features of unchanged images. Needs a network once, for tensorflow-datasets to
fetch CIFAR-10 (160 MB). Nobody has run it to the end yet: no accuracy is claimed. The tests run a reduced form of it.
"""

from experiments import image_contrastive
from experiments.image_contrastive import Config

CONFIG = Config(
    workdir="runs/cifar10_simclr",
    dataset="cifar10",
    steps=97_656,
    batch_size=512,
    learning_rate=2.0,
    ema=0.0,
    bfloat16=True,
    warmup=977,
    log_every=100,
    save_every=5000,
)


def main() -> None:
    """Runs the command line."""
    image_contrastive.command_line(__doc__, "cifar10_simclr", CONFIG)


if __name__ == "__main__":
    main()
