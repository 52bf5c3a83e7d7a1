"""Networks: Flax linen modules on one loop-safe convolution. They know no loss, no schedule and no mesh.

Each is used as ``params = init(module, key, x, ...)`` and ``module.apply(params, x, ...)``.
"""

from jaxgen.nets.autoencoder import ConvAutoencoder
from jaxgen.nets.convolution import Conv, ConvTranspose, convolve, convolve_transpose, upsample_convolve
from jaxgen.nets.embedding import LabelEmbedding, time_embedding
from jaxgen.nets.initialisation import constant, init, normal, variance_scaling
from jaxgen.nets.normalisation import BatchNorm, GroupNorm, calibrate
from jaxgen.nets.unet import UNet

__all__ = [
    "BatchNorm",
    "Conv",
    "ConvAutoencoder",
    "ConvTranspose",
    "GroupNorm",
    "LabelEmbedding",
    "UNet",
    "calibrate",
    "constant",
    "convolve",
    "convolve_transpose",
    "init",
    "normal",
    "time_embedding",
    "upsample_convolve",
    "variance_scaling",
]
