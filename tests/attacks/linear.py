"""The greatest rise of a linear function within ball and bounds, in float64."""

import math

import numpy as np


def greatest_gain(w, x, norm, eps, low, high):
    """Of ``w . (x' - x)`` for each example of x [batch, ...]."""
    w = np.asarray(w, np.float64).ravel()
    return np.array([_gain(w, np.asarray(c, np.float64).ravel(), norm, eps, low, high) for c in np.asarray(x)])


def _gain(w, c, norm, eps, low, high):
    room = np.where(w > 0, high - c, c - low)
    if norm == math.inf:
        return np.sum(np.abs(w) * np.minimum(eps, room))
    if norm == 2:  # coordinates rise in proportion to |w| until they reach their bounds
        least, most = 0.0, 1e9
        for _ in range(200):
            middle = (least + most) / 2
            within = np.linalg.norm(np.minimum(middle * np.abs(w), room)) <= eps
            least, most = (middle, most) if within else (least, middle)
        return np.sum(np.abs(w) * np.minimum(least * np.abs(w), room))
    gain, left = 0.0, eps  # a knapsack: the dearest first
    for i in np.argsort(-np.abs(w)):
        move = min(left, room[i])
        gain, left = gain + move * abs(w[i]), left - move
    return gain
