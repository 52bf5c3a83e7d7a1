"""A class-conditional diffusion model of real handwritten digits, 8 x 8, in minutes on two CPU cores.

    python -m experiments.digits_diffusion

The data come with scikit-learn, so no network is needed. The run measures itself: a classifier trained on the real
digits says how many samples it recognises as the class that was asked for, beside the Fréchet distance on its features
and the nearest training image of some samples. Stop it with Ctrl-C, and the same command goes on from there.

Two CPU cores: 3.1 minutes of training (1,037 images/s), 3.8 for all. Seed 0: the classifier, right on 98.6 % of 359
held-out images, recognises 99.6 % of 1,000 samples; Fréchet distance on its features 3.8, that of the held-out images
5.7; median distance to the nearest training image 1.98, of the held-out images 2.04.

`--network dit` trains a diffusion transformer of 1.3 million parameters instead, in 3.7 minutes for all. Seed 0: 98.8 %
of 1,000 samples are recognised, Fréchet distance 5.3, median distance to the nearest training image 2.11.
"""

from experiments import image_diffusion, image_run
from experiments.image_diffusion import Config

CONFIG = Config(
    workdir="runs/digits_diffusion",
    dataset="digits",
    steps=3000,
    batch_size=64,
    learning_rate=3e-3,
    ema=0.998,
    sigma_data=0.75,
    time_mean=-0.8,
    sigma_min=0.01,
    guidance=1.2,
)


def main() -> None:
    """Runs the command line."""
    image_run.command_line(__doc__, "digits_diffusion", CONFIG, image_diffusion)


if __name__ == "__main__":
    main()
