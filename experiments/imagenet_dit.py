"""A class-conditional diffusion transformer of ImageNet in pixels, 256 x 256, for a TPU host of eight chips.

    python -m experiments.imagenet_dit

No autoencoder: DiT-L on patches of 16 x 16 pixels (Peebles & Xie 2022, arXiv:2212.09748), 459 million parameters, whose
output is the clean image, on a rectified flow with errors measured in velocity, as Li & He 2025 ("Just image
transformers", arXiv:2511.13720) found that patches of so many pixels need. Theirs are the distribution of times, five
epochs of warm-up to a learning rate of 2e-4 at a batch of 1,024, the decay of the average, 50 steps of Heun's method,
rotary positions and normalised queries and keys. What differs: the blocks are DiT's (no SwiGLU, no class tokens, no
bottleneck), Adam's betas are optax's, the learning rate decays along a cosine over 200 epochs, gradients are clipped,
and guidance acts at all times.

Activations are bfloat16 and recomputed block by block, state and batch are split over all eight chips (`--fsdp`). Needs
tensorflow-datasets' imagenet2012: put ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar from image-net.org into
downloads/manual of `--data-dir`, and have TensorFlow installed while they are prepared, once, for 23 images of odd
formats. Training does not need it.

Nobody has run it to the end yet: no Fréchet distance is claimed. The tests run a reduced form of it.
"""

from experiments import image_flow, image_run
from experiments.image_diffusion import Transformer
from experiments.image_flow import Config

CONFIG = Config(
    workdir="runs/imagenet_dit",
    dataset="imagenet2012",
    fsdp=8,
    steps=250_000,  # 200 epochs
    batch_size=1024,
    learning_rate=2e-4,
    warmup=6250,
    ema=0.9999,
    flip=True,
    image_size=256,
    network="dit",
    dit=Transformer(patch=16, features=1024, depth=24, heads=16, rotary=True, qk_norm=True, remat=True),
    bfloat16=True,
    guidance=2.0,
    sample_steps=50,
    log_every=100,
    save_every=5000,
    grid_every=5000,
    judged=0,  # a small classifier is no judge of ImageNet
)


def main() -> None:
    """Runs the command line."""
    image_run.command_line(__doc__, "imagenet_dit", CONFIG, image_flow, solver="heun", steps=CONFIG.sample_steps)


if __name__ == "__main__":
    main()
