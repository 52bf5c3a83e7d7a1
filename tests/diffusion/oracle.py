"""What the diffusion tests share: the paths, the solvers with their orders, and one Gaussian data set."""

import numpy as np

from jaxgen import diffusion

PATHS = {
    "linear_beta": diffusion.linear_beta(),
    "cosine": diffusion.cosine(),
    "edm": diffusion.edm(),
    "rectified_flow": diffusion.rectified_flow(),
}

ORDERS = {
    "ddim": (diffusion.ddim, 1),
    "euler": (diffusion.euler, 1),
    "heun": (diffusion.heun, 2),
    "dpmpp_2m": (diffusion.dpmpp_2m, 2),
}

MEAN = np.array([0.3, -0.5, 1.0])
STD = np.array([0.2, 0.6, 1.5])


def interior_times(path: diffusion.Path, steps: int) -> np.ndarray:
    """Log-SNR uniform from ratio 20 to ratio 0.05, where every path is smooth; does not end at 0."""
    return diffusion.time_at_ratio(path, np.geomspace(20.0, 0.05, steps + 1))
