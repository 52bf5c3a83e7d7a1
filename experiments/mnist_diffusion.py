"""A class-conditional diffusion model of MNIST, 28 x 28: the digits experiment at the size that papers use.

    python -m experiments.mnist_diffusion

Needs a network once, for tensorflow-datasets to fetch MNIST (11 MB). Meant for one GPU or a TPU VM. Nobody has run it
to the end yet, so no quality is claimed here; the tests run a reduced form of it.
"""

from experiments import image_diffusion, image_run
from experiments.image_diffusion import Config

CONFIG = Config(
    workdir="runs/mnist_diffusion",
    dataset="mnist",
    steps=20_000,
    batch_size=256,
    learning_rate=1e-3,
    warmup=1000,
    ema=0.9995,
    channels=64,
    multipliers=(1, 2, 2),
    blocks=2,
    attention=(7,),
    groups=16,
    sigma_data=0.6,
    time_mean=-1.0,
    guidance=1.2,
    log_every=50,
    save_every=2000,
    grid_every=2000,
    judge_steps=3000,
)


def main() -> None:
    """Runs the command line."""
    image_run.command_line(__doc__, "mnist_diffusion", CONFIG, image_diffusion)


if __name__ == "__main__":
    main()
