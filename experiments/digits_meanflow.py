"""Handwritten digits in one evaluation of the network: MeanFlow on 8 x 8 images, in minutes on two CPU cores.

    python -m experiments.digits_meanflow

No teacher, no schedule of stages: one loss (arXiv:2505.13447). The data come with scikit-learn. The run measures itself
as `experiments.digits_diffusion` does, on samples of one step and of two.

Two CPU cores: 4.5 minutes of training (709 images/s), 4.9 for all. Seed 0: the classifier, right on 98.6 % of 359
held-out images, recognises 99.8 % of 1,000 samples of one evaluation and 99.3 % of two; Fréchet distance on its
features 11.1 and 8.0, that of the held-out images 5.7; median distance to the nearest training image 1.83 and 1.89, of
the held-out images 2.04.
"""

from experiments import image_meanflow, image_run
from experiments.image_meanflow import Config

CONFIG = Config(
    workdir="runs/digits_meanflow",
    dataset="digits",
    steps=3000,
    batch_size=64,
    learning_rate=3e-3,
    ema=0.998,
    guidance=1.3,
    judged_steps=(2,),
)


def main() -> None:
    """Runs the command line."""
    image_run.command_line(__doc__, "digits_meanflow", CONFIG, image_meanflow, solver="euler", steps=1)


if __name__ == "__main__":
    main()
