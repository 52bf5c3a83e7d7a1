"""Networks: Flax linen modules, convolutional on one loop-safe convolution, and a transformer.

They know no loss, no schedule and no mesh.

Each is used as ``params = init(module, key, x, ...)`` and ``module.apply(params, x, ...)``.
"""

from jaxgen.nets.attention import SelfAttention
from jaxgen.nets.autoencoder import ConvAutoencoder
from jaxgen.nets.convolution import Conv, ConvTranspose, convolve, convolve_transpose, upsample_convolve
from jaxgen.nets.dcgan import DCGANDiscriminator, DCGANGenerator
from jaxgen.nets.dit import DiT, DiT_B, DiT_L, DiT_S, DiT_XL
from jaxgen.nets.embedding import LabelEmbedding, time_embedding
from jaxgen.nets.flash import flash_attention
from jaxgen.nets.heads import MLP
from jaxgen.nets.inception import Inception
from jaxgen.nets.inception_input import clean_fid_input, pytorch_fid_input, tensorflow_fid_input
from jaxgen.nets.initialisation import constant, init, normal, variance_scaling
from jaxgen.nets.normalisation import BatchNorm, GroupNorm, RMSNorm, calibrate, layer_norm
from jaxgen.nets.patches import patchify, unpatchify
from jaxgen.nets.positions import Positions, rotary_positions, rotate, sincos, sincos_positions
from jaxgen.nets.r3gan import R3GANDiscriminator, R3GANGenerator
from jaxgen.nets.resample import bilinear_downsample, bilinear_upsample
from jaxgen.nets.resnet import ResNet, ResNet18, ResNet34, ResNet50, Stem, WideResNet, cifar_stem, imagenet_stem
from jaxgen.nets.unet import UNet

__all__ = [
    "MLP",
    "BatchNorm",
    "Conv",
    "ConvAutoencoder",
    "ConvTranspose",
    "DCGANDiscriminator",
    "DCGANGenerator",
    "DiT",
    "DiT_B",
    "DiT_L",
    "DiT_S",
    "DiT_XL",
    "GroupNorm",
    "Inception",
    "LabelEmbedding",
    "Positions",
    "R3GANDiscriminator",
    "R3GANGenerator",
    "RMSNorm",
    "ResNet",
    "ResNet18",
    "ResNet34",
    "ResNet50",
    "SelfAttention",
    "Stem",
    "UNet",
    "WideResNet",
    "bilinear_downsample",
    "bilinear_upsample",
    "calibrate",
    "cifar_stem",
    "clean_fid_input",
    "constant",
    "convolve",
    "convolve_transpose",
    "flash_attention",
    "imagenet_stem",
    "init",
    "layer_norm",
    "normal",
    "patchify",
    "pytorch_fid_input",
    "rotary_positions",
    "rotate",
    "sincos",
    "sincos_positions",
    "tensorflow_fid_input",
    "time_embedding",
    "unpatchify",
    "upsample_convolve",
    "variance_scaling",
]
