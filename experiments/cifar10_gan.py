"""A class-conditional GAN of CIFAR-10 at the published scale of R3GAN, for a TPU host.

    python -m experiments.cifar10_gan

Settings follow R3GAN's on CIFAR-10 (Huang et al. 2024, arXiv:2501.05441): batches of 512, ResNets of 768 channels in
each of four stages, Adam without momentum, and a burn-in of 20 million images in which the learning rate goes from 2e-4
to 5e-5, gamma from 0.05 to 0.005, Adam's memory from 0.9 to 0.99 and the probability of augmentation from 0 to 0.55; an
average of the generator with a half-life of 5 million images. What differs: the average's half-life is short at first
by its warm-up rather than by a cosine, `gan.ada` interpolates linearly and meets data and samples alike, all but the
layers that make images and logits compute in bfloat16, and the run sees 200 million images.

Needs a network once, for tensorflow-datasets to fetch CIFAR-10 (160 MB). Nobody has run it to the end yet: no Fréchet
distance is claimed. The tests run a reduced form of it.
"""

from experiments import image_gan, image_run
from experiments.image_gan import Config

CONFIG = Config(
    workdir="runs/cifar10_gan",
    dataset="cifar10",
    steps=390_625,
    batch_size=512,
    learning_rate=2e-4,
    learning_rate_end=5e-5,
    burn_in=39_063,
    gamma=0.05,
    gamma_end=0.005,
    ema=0.999929,  # 0.5 ** (512 / 5_000_000)
    flip=True,
    augment="ada",
    ada_target=None,
    ada_most=0.55,
    widths=(768, 768, 768, 768),
    bfloat16=True,
    log_every=100,
    save_every=5000,
    grid_every=5000,
    judged=0,  # a small classifier is no judge of CIFAR-10
)


def main() -> None:
    """Runs the command line."""
    image_run.command_line(__doc__, "cifar10_gan", CONFIG, image_gan)


if __name__ == "__main__":
    main()
