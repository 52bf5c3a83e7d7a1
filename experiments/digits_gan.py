"""A class-conditional GAN of real handwritten digits, 8 x 8, in minutes on two CPU cores.

python -m experiments.digits_gan
"""

from experiments import image_gan, image_run
from experiments.image_gan import Config

CONFIG = Config(
    workdir="runs/digits_gan",
    dataset="digits",
    steps=4000,
    batch_size=64,
    learning_rate=1e-3,
    learning_rate_end=2e-4,
    ema=0.999,
    upright=True,
    latent=32,
    widths=(64, 32),
    blocks=2,
    expansion=1,
    group_size=32,
    grid_every=100,
)


def main() -> None:
    """Runs the command line."""
    image_run.command_line(__doc__, "digits_gan", CONFIG, image_gan)


if __name__ == "__main__":
    main()
