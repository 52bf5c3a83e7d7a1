"""Weights of others: the U-Nets of diffusers, read and written back, and the Inception network of published scores.

A directory of a diffusers ``UNet2DModel`` holds ``config.json`` and ``diffusion_pytorch_model.safetensors``, whole or
as shards that an index names. A safetensors file is a table of contents and then numbers, so reading one runs no code.
A pickle (``.bin``) can, and is never opened. The one file of Inception weights that everybody uses is a pickle, and is
opened by its SHA-256 and as numbers alone: see `load_inception`.

Time: diffusers counts its noise levels from 0, while t = 0 is the data here and `diffusion.linear_beta` has its levels
at t = 1, 2, ...: their timestep is t - 1. A network that came from there therefore wants

    network, params = pretrained.load_diffusers_unet(directory)
    net = lambda x, t: network.apply(params, x, t - 1)
    denoise = diffusion.denoiser(diffusion.linear_beta(), diffusion.noise, net)

What it was trained to predict, and on which path, is not in its directory but in the pipeline's
``scheduler/scheduler_config.json``: this is for ``"beta_schedule": "linear"`` (from ``beta_start`` 0.0001 to
``beta_end`` 0.02 in ``num_train_timesteps`` 1000) and ``"prediction_type": "epsilon"``.
"""

from jaxgen.pretrained.inception import load_inception
from jaxgen.pretrained.unet import load_diffusers_unet, save_diffusers_unet

__all__ = ["load_diffusers_unet", "load_inception", "save_diffusers_unet"]
