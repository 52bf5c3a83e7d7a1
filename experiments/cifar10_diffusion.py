"""A class-conditional diffusion model of CIFAR-10 at the published scale of DDPM++ and EDM, for a TPU host.

    python -m experiments.cifar10_diffusion

Settings follow EDM's class-conditional DDPM++ model (Karras et al. 2022, arXiv:2206.00364, table 7): 200 million images
seen in batches of 512, learning rate 1e-3, dropout 0.13, an average of the weights with a half-life of 500,000 images,
18 steps of sampling. What differs: the U-Net is jaxgen's own (additive time embedding, attention at 16 pixels), the
augmentation is mirroring alone, the learning rate decays along a cosine, the activations are bfloat16.

Needs a network once, for tensorflow-datasets to fetch CIFAR-10 (160 MB). Nobody has run it to the end yet: no Fréchet
distance is claimed. The tests run a reduced form of it.
"""

from experiments import image_diffusion, image_run
from experiments.image_diffusion import Config

CONFIG = Config(
    workdir="runs/cifar10_diffusion",
    dataset="cifar10",
    steps=390_625,
    batch_size=512,
    learning_rate=1e-3,
    warmup=19_531,  # 10 million images
    ema=0.99929,  # 0.5 ** (512 / 500_000)
    flip=True,
    channels=128,
    multipliers=(2, 2, 2),
    blocks=4,
    attention=(16,),
    groups=32,
    dropout=0.13,
    bfloat16=True,
    sigma_data=0.5,
    sample_steps=18,
    log_every=100,
    save_every=5000,
    grid_every=5000,
    judged=0,  # a small classifier is no judge of CIFAR-10
)


def main() -> None:
    """Runs the command line."""
    image_run.command_line(__doc__, "cifar10_diffusion", CONFIG, image_diffusion)


if __name__ == "__main__":
    main()
