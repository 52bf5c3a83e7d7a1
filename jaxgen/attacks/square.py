"""Square attack: random search by squares of colour, without gradients.

Andriushchenko et al. 2020 (arXiv:1912.00049). The perturbation always uses all of the ball. A proposal changes it in
one square at a random place, and is kept where the objective has grown. The square's side falls with the share p of
the pixels that it covers,

    side = sqrt(p height width),    p = share / 2^j                                                       (1)

where j counts the numbers 10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000 that 10000 i / queries exceeds at query i
(section 4.1).

For inf (Algorithm 2) the perturbation is eps or -eps everywhere: it starts as stripes a pixel wide, and a square takes
one of the two for each channel.

For 2 (Algorithm 3), and by the same formulas for 1, a square W takes over the budget of another one, V. Its shape is a
pair of bumps of opposite signs (Eq. 2 of the paper), and b is that shape, of norm 1 and of a random sign per channel;
d is the perturbation, of norm || d ||_p, and ch the number of channels:

    n   = b + d_W / || d_W ||_p                                                                           (2)
    d_W <- n / || n ||_p (|| d_(W u V) ||_p^p + max(eps^p - || d ||_p^p, 0) / ch)^(1/p),    d_V <- 0       (3)

channel by channel; then all of it is brought to the norm eps and clipped to the bounds. With H_m = sum_(j <= m) 1 / j^2
a bump of the size h x w is H_(n+1) - H_m at the distance m, in rows or columns, whichever is more, from its centre, for
n = floor(max(h, w) / 2): a stack of ever larger squares of ever smaller weight.
"""

import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxgen import checks, random
from jaxgen.attacks.boundary import within
from jaxgen.attacks.objectives import evaluate
from jaxgen.attacks.threat import ThreatModel, check
from jaxgen.typing import Array, ArrayLike, Key, Objective

_THRESHOLDS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)


class _State(NamedTuple):
    queries: Array
    delta: Array
    x: Array
    value: Array
    won: Array


def square(
    key: Key,
    objective: Objective,
    x: Array,
    threat: ThreatModel,
    *,
    queries: int = 5000,
    share: ArrayLike = 0.8,
) -> Array:
    """Random search by squares, which needs an objective's values alone: gradients that lie do not matter.

    Example i sees its own squares. It keeps what won it; the others go on until every example is won or the queries are
    spent. Objectives that do not know when they have won spend them all.

    As in the paper's text, but not in its program, a square may touch the last row and column. An example of which no
    proposal is better than it came stays as it came.

    Args:
        key: a single key, or [batch] keys: example i draws from ``fold_in(key, i)``.
        objective: ``x -> [batch]``; never differentiated.
        x: [batch, height, width, channels] within the bounds, floating: the clean images.
        threat: of any norm, of finite ``eps``. For norm 1, where few pixels are worth much, it is weak.
        queries: how often the objective is evaluated at most, ``x`` itself included; at least 2.
        share: the part of the image that the first squares cover, a scalar in (0, 1]. 0.8 is AutoAttack's; the paper's
            0.05 for inf and 0.1 for 2 suit classifiers that are not robust.

    Returns:
        The shape and dtype of ``x``, in ball and bounds.

    Raises:
        TypeError: ``x`` is not floating, or ``key`` not a typed key.
        ValueError: ``x`` is not of rank 4 or does not fit ``threat``, its value is not [batch], or an option is out of
            range.

    >>> threat = ThreatModel(math.inf, eps=0.25, low=0.0, high=1.0)
    >>> x = square(jax.random.key(0), lambda x: x.sum((1, 2, 3)), jnp.full((1, 2, 2, 1), 0.5), threat, queries=50)
    >>> x.ravel()
    Array([0.75, 0.75, 0.75, 0.75], dtype=float32)
    """
    check(threat, x)
    checks.shape("x", x, (None, None, None, None))
    checks.finite("threat.eps", threat.eps)
    checks.positive_integer("queries", queries)
    if queries < 2:
        raise ValueError(f"`queries` must be an integer of at least 2, got {queries}")
    checks.shape("share", share, ())
    checks.positive("share", share)
    checks.interval("share", share, 0, 1)
    x = jnp.asarray(x)
    keys = random.keys_for(key, x.shape[0])
    wide = jnp.promote_types(x.dtype, jnp.float32)
    clean, eps = x.astype(wide), jnp.broadcast_to(jnp.asarray(threat.eps, wide), x.shape[:1])
    height, width = x.shape[1:3]
    if threat.norm == math.inf:
        start, propose = partial(_stripes, x.shape[1:]), _recolour
    else:
        p = int(threat.norm)
        start, propose = partial(_tiles, x.shape[1:], p), partial(_rebump, p)

    def place(delta: Array, number: ArrayLike) -> _State:
        delta = jnp.clip(delta, threat.low - clean, threat.high - clean).astype(wide)
        x_adv = within(threat, clean + delta, x.dtype)
        return _State(jnp.asarray(number), delta, x_adv, *evaluate(objective, x_adv))

    def goes_on(state: _State) -> Array:
        return (state.queries < queries) & jnp.any(~state.won)

    def query(old: _State) -> _State:
        halvings = jnp.sum(10_000 / queries * old.queries > jnp.array(_THRESHOLDS))
        side = jnp.round(jnp.sqrt(share * 0.5**halvings * height * width)).astype(int)
        drawn = random.fold(keys, old.queries)
        new = place(jax.vmap(propose, (0, 0, 0, None))(drawn, old.delta, eps, side), old.queries + 1)
        taken = ~old.won & (new.won | (new.value > old.value))
        kept = jax.tree.map(partial(jax.vmap(jnp.where), taken), new[1:], old[1:])
        return _State(new.queries, *kept)

    value, won = evaluate(objective, x)
    first = place(jax.vmap(start)(random.fold(keys, 0), eps), 2)
    last = jax.lax.while_loop(goes_on, query, first._replace(won=first.won | won))
    no_better = won | ~last.won & (value >= last.value)
    return jax.vmap(jnp.where)(no_better, x, last.x)


def _stripes(shape: tuple[int, ...], key: Key, eps: Array) -> Array:
    """Columns of eps or -eps for each channel: [height, width, channels]."""
    return eps * jax.random.rademacher(key, (1, *shape[1:]), eps.dtype) * jnp.ones((shape[0], 1, 1), eps.dtype)


def _recolour(key: Key, delta: Array, eps: Array, side: Array) -> Array:
    """Eps or -eps for each channel of a square: [height, width, channels]."""
    u = jax.random.uniform(key, (2 + delta.shape[2],))
    window = _window(u[:2], delta.shape, jnp.maximum(side, 1))
    return jnp.where(window.mask[..., None], eps * _signs(u[2:]), delta)


def _tiles(shape: tuple[int, ...], p: int, key: Key, eps: Array) -> Array:
    """A grid of pairs of bumps, a fifth of the shorter side wide, of random signs: [height, width, channels]."""
    height, width, channels = shape
    side = max(min(height, width) // 5, 1)
    rows, columns = height // side, width // side
    sign_key, turn_key = jax.random.split(key)
    across = jnp.arange(side)
    pair = _pair(p, across[:, None], across, side, side)
    turned = jax.random.bernoulli(turn_key, shape=(rows, columns, 1, 1))
    signs = jax.random.rademacher(sign_key, (rows, columns, channels), eps.dtype)
    tiles = jnp.where(turned, pair.T, pair)[..., None] * signs[:, :, None, None]
    grid = tiles.swapaxes(1, 2).reshape(rows * side, columns * side, channels)
    top, left = (height - rows * side) // 2, (width - columns * side) // 2
    framed = jnp.zeros(shape).at[top : top + rows * side, left : left + columns * side].set(grid)
    return eps * _unit(p, framed, (0, 1, 2))


def _rebump(p: int, key: Key, delta: Array, eps: Array, side: Array) -> Array:
    """Eqs. 2 and 3: [height, width, channels]."""
    u = jax.random.uniform(key, (5 + delta.shape[2],))
    side = jnp.maximum(side, 3)
    side += 1 - side % 2
    to, taken_from = (_window(corner, delta.shape, side) for corner in (u[:2], u[2:4]))
    pair = jnp.where(
        u[4] < 0.5,
        _pair(p, to.columns, to.rows, to.width, to.height),
        _pair(p, to.rows, to.columns, to.height, to.width),
    )
    w, v = to.mask[..., None], taken_from.mask[..., None]
    b = pair[..., None] * _signs(u[5:])
    n = b + _unit(p, jnp.where(w, delta, 0), (0, 1))
    spare = jnp.maximum(eps**p - _power(p, delta, (0, 1, 2)), 0) / delta.shape[2]
    budget = (_power(p, jnp.where(w | v, delta, 0), (0, 1)) + spare) ** (1 / p)
    return eps * _unit(p, jnp.where(w, budget * _unit(p, n, (0, 1)), jnp.where(v, 0, delta)), (0, 1, 2))


class _Window(NamedTuple):
    """A rectangle: its size, every pixel's coordinates relative to its corner, and which of them it covers."""

    height: Array
    width: Array
    rows: Array
    columns: Array
    mask: Array


def _signs(u: Array) -> Array:
    return jnp.where(u < 0.5, -1, 1)


def _window(u: Array, shape: tuple[int, ...], side: Array) -> _Window:
    """A square no larger than the image, at a random place: u, [2], is uniform in [0, 1)."""
    height, width = jnp.minimum(side, shape[0]), jnp.minimum(side, shape[1])
    places = jnp.array([shape[0] - height + 1, shape[1] - width + 1])
    top, left = jnp.floor(u * places).astype(int)
    rows, columns = jnp.arange(shape[0])[:, None] - top, jnp.arange(shape[1]) - left
    mask = (rows >= 0) & (rows < height) & (columns >= 0) & (columns < width)
    return _Window(height, width, rows, columns, mask)


def _pair(p: int, rows: Array, columns: Array, height: ArrayLike, width: ArrayLike) -> Array:
    """Two bumps one above the other, of equal norms and opposite signs, of norm 1 together; 0 outside."""
    harmonic = jnp.pad(jnp.cumsum(1 / jnp.arange(1, rows.size + columns.size + 1) ** 2), (1, 0))
    half = height // 2
    upper = rows < half
    h, row = jnp.where(upper, half, height - half), jnp.where(upper, rows, rows - half)
    n = jnp.maximum(h, width) // 2
    m = jnp.maximum(jnp.abs(row - h // 2), jnp.abs(columns - width // 2))
    inside = (rows >= 0) & (rows < height) & (columns >= 0) & (columns < width)
    bumps = jnp.where(inside, harmonic[n + 1] - harmonic[m], 0)
    above, below = (_unit(p, jnp.where(which, bumps, 0), (0, 1)) for which in (upper, ~upper))
    return _unit(p, above - below, (0, 1))


def _power(p: int, v: Array, axes: tuple[int, ...]) -> Array:
    return jnp.sum(jnp.abs(v) ** p, axis=axes, keepdims=True)


def _unit(p: int, v: Array, axes: tuple[int, ...]) -> Array:
    """Of norm p = 1 over the axes, or 0."""
    norm = _power(p, v, axes) ** (1 / p)
    return v / jnp.where(norm > 0, norm, 1)
