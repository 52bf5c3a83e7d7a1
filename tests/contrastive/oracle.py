"""The losses as their papers write them: double loops over pairs, in float64."""

import numpy as np


def unit(x):
    x = np.asarray(x, np.float64)
    return np.stack([row / np.linalg.norm(row) if row.any() else row for row in x])


def nt_xent(first, second, temperature):
    z, n = unit(np.concatenate([first, second])), len(first)
    losses = []
    for i in range(2 * n):
        total = sum(np.exp(z[i] @ z[k] / temperature) for k in range(2 * n) if k != i)
        losses.append(-np.log(np.exp(z[i] @ z[(i + n) % (2 * n)] / temperature) / total))
    return np.array(losses)


def dcl(first, second, temperature):
    z, n = unit(np.concatenate([first, second])), len(first)
    losses = []
    for i in range(2 * n):
        total = sum(np.exp(z[i] @ z[k] / temperature) for k in range(2 * n) if k % n != i % n)
        losses.append(-z[i] @ z[(i + n) % (2 * n)] / temperature + np.log(total))
    return np.array(losses)


def info_nce(first, second, temperature):
    x, y, n = unit(first), unit(second), len(first)
    losses = []
    for i in range(n):
        pair = np.exp(x[i] @ y[i] / temperature)
        forth = sum(np.exp(x[i] @ y[k] / temperature) for k in range(n))
        back = sum(np.exp(x[k] @ y[i] / temperature) for k in range(n))
        losses.append(-(np.log(pair / forth) + np.log(pair / back)) / 2)
    return np.array(losses)


def siglip(first, second, temperature, bias):
    x, y, n = unit(first), unit(second), len(first)
    losses = []
    for i in range(n):
        signs = [1 if i == j else -1 for j in range(n)]
        losses.append(sum(np.log(1 + np.exp(-s * (x[i] @ y[j] / temperature + bias))) for j, s in enumerate(signs)))
    return np.array(losses)


def supcon(embeddings, labels, temperature):
    z, n = unit(embeddings), len(embeddings)
    losses = []
    for i in range(n):
        total = sum(np.exp(z[i] @ z[k] / temperature) for k in range(n) if k != i)
        positives = [p for p in range(n) if p != i and labels[p] == labels[i]]
        terms = [-np.log(np.exp(z[i] @ z[p] / temperature) / total) for p in positives]
        losses.append(np.mean(terms) if terms else 0.0)
    return np.array(losses)


def slope(function, x, *, step=1e-6):
    """Central differences of a scalar function of an array."""
    x = np.asarray(x, np.float64)
    gradient = np.zeros_like(x)
    for at in np.ndindex(x.shape):
        ahead, behind = x.copy(), x.copy()
        ahead[at] += step
        behind[at] -= step
        gradient[at] = (function(ahead) - function(behind)) / (2 * step)
    return gradient
