"""ADA against the paper's matrices in NumPy and SciPy, the statistics of what it draws, and its controller."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import ndimage, stats

from jaxgen import gan, random
from jaxgen.gan.adaptive import ada, adapt_probability
from jaxgen.gan.colour import Colour, draw_colour, recolour
from jaxgen.gan.geometry import Geometry, draw_geometry, warp

KEY = jax.random.key(0)
P = np.float32(0.8)
X = jax.random.uniform(jax.random.key(1), (6, 8, 8, 3), minval=-1, maxval=1)
BLITS = {"flip": True, "quarter_turns": True, "integer_translation": 0.125}
WARPS = BLITS | {"scale": 0.2, "rotation": np.pi, "stretch": 0.2, "translation": 0.125}
COLOURS = {"brightness": 0.2, "contrast": 0.5, "luma_flip": True, "hue": np.pi, "saturation": 1.0}
OFF = {name: type(strength)(0) for name, strength in (WARPS | COLOURS).items()}
STILL = Geometry(0, 0, jnp.zeros(2), 1.0, 0.0, 1.0, 0.0, jnp.zeros(2))
PLAIN = Colour(0.0, 1.0, 1, 0.0, 1.0)

TRACES = []
warped = jax.jit(warp)


@functools.partial(jax.jit, static_argnames=list(OFF))
def augmented(key, x, probability, **options):
    TRACES.append(x.shape)
    return ada(key, x, probability, **options)


@functools.partial(jax.jit, static_argnames=["count"])
def drawn(probability, count):
    """``count`` draws of a warp of 16 x 24 pixels and of colours, by the paper's strengths."""

    def draw(key):
        warp_key, colour_key = jax.random.split(key)
        geometry = draw_geometry(warp_key, probability, (16, 24), **WARPS)
        return geometry, draw_colour(colour_key, probability, **COLOURS)

    return jax.vmap(draw)(random.example_keys(KEY, count))


def rows(tree, count):
    for i in range(count):
        yield jax.tree.map(lambda leaf, i=i: leaf[i], tree)


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [((2, 7, 12, 3), "float32"), ((2, 3, 300, 1), "bfloat16"), ((2, 1, 6, 3), "float32")],
)
def test_at_probability_0_it_is_the_identity(shape, dtype):
    x = jax.random.normal(KEY, shape).astype(dtype)
    y = augmented(KEY, x, 0.0)
    assert y.dtype == dtype
    np.testing.assert_array_equal(y, x)


def paper_matrix(g, height, width):
    """The forward matrix of (x, y, 1) by the pseudocode of appendix B, the origin at the centre and y downwards."""
    rotate = lambda a: np.array([[np.cos(a), -np.sin(a), 0], [np.sin(a), np.cos(a), 0], [0, 0, 1]])  # noqa: E731
    move = lambda t: np.array([[1, 0, t[1]], [0, 1, t[0]], [0, 0, 1]])  # noqa: E731
    centre = move(((height - 1) / 2, (width - 1) / 2))
    steps = [
        np.linalg.inv(centre),
        np.diag([1 - 2 * g.flip, 1, 1]),
        rotate(-np.pi / 2 * g.turns),
        move(g.steps),
        np.diag([g.scale, g.scale, 1]),
        rotate(-g.before),
        np.diag([g.stretch, 1 / g.stretch, 1]),
        rotate(-g.after),
        move(g.shift),
        centre,
    ]
    return functools.reduce(lambda matrix, step: step @ matrix, steps)


@pytest.mark.parametrize(("height", "width"), [(16, 24), (15, 15)])
def test_warps_are_the_papers_matrices(height, width):
    """SciPy samples the image in float64 where the inverse of the paper's matrix says."""
    image = np.random.default_rng(0).normal(size=(height, width, 2))
    geometries = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), drawn(1.0, 40)[0])
    y, x = np.mgrid[:height, :width]
    with jax.enable_x64(True):
        for g in rows(geometries, 40):
            sources = np.linalg.inv(paper_matrix(g, height, width)) @ np.stack([x, y, np.ones_like(x)]).reshape(3, -1)
            at = sources[1::-1].reshape(2, height, width)
            expected = [ndimage.map_coordinates(image[..., c], at, order=1, mode="mirror") for c in range(2)]
            came = warped(jnp.asarray(image), g._replace(turns=int(g.turns), flip=int(g.flip)))
            np.testing.assert_allclose(came, np.stack(expected, -1), atol=1e-9)


def test_blits_move_pixels_untouched():
    image = np.asarray(X[0])
    for turns in range(4):
        np.testing.assert_array_equal(warped(image, STILL._replace(turns=turns)), np.rot90(image, turns))
        flipped = STILL._replace(turns=turns, flip=1)
        np.testing.assert_array_equal(warped(image, flipped), np.rot90(image[:, ::-1], turns))
    padded = np.pad(image, ((20, 20), (20, 20), (0, 0)), mode="reflect")
    for down, right in [(1, 0), (0, -1), (-3, 2), (14, 0), (-17, 20)]:
        moved = warped(image, STILL._replace(steps=jnp.array([down, right], jnp.float32)))
        np.testing.assert_array_equal(moved, padded[20 - down : 28 - down, 20 - right : 28 - right])


def test_a_scale_and_its_inverse_compose_to_the_identity():
    """On a linear ramp, where bilinear interpolation is exact, inside of the mirror."""
    ramp = np.add.outer(np.arange(33.0), 2 * np.arange(33.0))[..., None].astype(np.float32)
    for name in ("scale", "stretch"):
        there = warped(ramp, STILL._replace(**{name: 1.25}))
        assert np.abs(there - ramp)[8:-8, 8:-8].max() > 1
        back = warped(there, STILL._replace(**{name: 0.8}))
        np.testing.assert_allclose(back[8:-8, 8:-8], ramp[8:-8, 8:-8], atol=1e-3)


def test_constants_stay_constant_under_every_warp():
    constant = jnp.full((8, 8, 1), 0.7)
    for probability in (0.3, 1.0):
        images = jax.jit(jax.vmap(warp, (None, 0)))(constant, drawn(probability, 40)[0])
        np.testing.assert_allclose(images, jnp.full((40, 8, 8, 1), 0.7), atol=1e-6)


def test_what_happens_to_an_image_by_chance():
    """Every part happens with its probability and apart from the others: within five standard errors."""
    count, p = 4000, 0.3
    g, c = jax.tree.map(np.asarray, drawn(p, count))
    half = 1 - np.sqrt(1 - p)
    happened = {
        "flip": (g.flip == 1, p / 2),
        "turns": (g.turns != 0, p * 3 / 4),
        # 1/8 of 16 x 24 are 2 and 3 pixels: both coordinates round to none in 1/4 x 1/6 of the cases.
        "steps": (np.any(g.steps != 0, axis=1), p * (1 - 1 / 24)),
        "scale": (g.scale != 1, p),
        "before": (g.before != 0, half),
        "after": (g.after != 0, half),
        "stretch": (g.stretch != 1, p),
        "shift": (np.all(g.shift != 0, axis=1), p),
        "brightness": (c.brightness != 0, p),
        "contrast": (c.contrast != 1, p),
        "luma": (c.luma == -1, p / 2),
        "hue": (c.hue != 0, p),
        "saturation": (c.saturation != 1, p),
    }
    close = lambda hits, chance: abs(hits.mean() - chance) < 5 * np.sqrt(chance * (1 - chance) / count)  # noqa: E731
    for name, (hits, chance) in happened.items():
        assert close(hits, chance), f"{name}: {hits.mean()} for {chance}"
    assert close(happened["before"][0] | happened["after"][0], p)
    pairs = [(a, b) for a in happened for b in happened if a < b]
    for a, b in pairs:
        assert close(happened[a][0] & happened[b][0], happened[a][1] * happened[b][1]), f"{a} and {b}"


def test_distributions_of_the_strengths():
    """Kolmogorov-Smirnov against the paper's distributions, each part certain."""
    g, c = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), drawn(1.0, 4000))
    normal = stats.norm.cdf
    uniform = stats.uniform(-np.pi, 2 * np.pi).cdf
    for values, cdf in [
        (np.log2(g.scale) / 0.2, normal),
        (np.log2(g.stretch) / 0.2, normal),
        (g.before, uniform),
        (g.after, uniform),
        (g.shift[:, 0] / 2, normal),
        (g.shift[:, 1] / 3, normal),
        (c.brightness / 0.2, normal),
        (np.log2(c.contrast) / 0.5, normal),
        (c.hue, uniform),
        (np.log2(c.saturation), normal),
    ]:
        assert stats.kstest(values, cdf).pvalue > 1e-4
    for values, chances in [
        (g.flip, [1 / 2] * 2),
        (g.turns, [1 / 4] * 4),
        (g.steps[:, 0] + 2, [1 / 8, 1 / 4, 1 / 4, 1 / 4, 1 / 8]),
        (g.steps[:, 1] + 3, [1 / 12, *[1 / 6] * 5, 1 / 12]),
        ((c.luma + 1) / 2, [1 / 2] * 2),
    ]:
        counts = np.bincount(values.astype(int))
        assert stats.chisquare(counts, np.array(chances) * len(values)).pvalue > 1e-4
    numbers = np.column_stack([*g, *c])
    correlations = np.corrcoef(numbers, rowvar=False) - np.eye(numbers.shape[1])
    assert np.abs(correlations).max() < 5 / np.sqrt(len(numbers))


def test_a_part_switched_off_leaves_the_others_draws():
    """Each option at 0 makes its fields, and no others, those of the identity."""
    fields = {
        **{"flip": ["flip"], "quarter_turns": ["turns"], "integer_translation": ["steps"], "scale": ["scale"]},
        **{"rotation": ["before", "after"], "stretch": ["stretch"], "translation": ["shift"]},
        **{name: [name] for name in COLOURS},
        "luma_flip": ["luma"],
    }
    g, c = drawn(1.0, 40)
    strengths = jnp.array([[float(name != off) for name in fields] for off in fields])

    @jax.jit
    def draws(strengths):
        scaled = {name: strength * s for (name, strength), s in zip((WARPS | COLOURS).items(), strengths, strict=True)}
        warps, colours = ({name: scaled[name] for name in part} for part in (WARPS, COLOURS))

        def draw(key):
            warp_key, colour_key = jax.random.split(key)
            return draw_geometry(warp_key, 1.0, (16, 24), **warps), draw_colour(colour_key, 1.0, **colours)

        return jax.vmap(draw)(random.example_keys(KEY, 40))

    for off, row in zip(fields, strengths, strict=True):
        for came, full, identity in zip(draws(row), (g, c), (STILL, PLAIN), strict=True):
            for field in full._fields:
                expected = getattr(identity if field in fields[off] else full, field)
                shape = getattr(full, field).shape
                np.testing.assert_allclose(getattr(came, field), np.broadcast_to(expected, shape), rtol=1e-5, atol=1e-6)


def test_every_option_reaches_its_part():
    """With a strength of its own for each, the images are what the modules of warps and colours make of the draws."""
    warps = WARPS | {"integer_translation": 0.4, "scale": 0.3, "rotation": 1.0, "stretch": 0.1, "translation": 0.2}
    colours = COLOURS | {"brightness": 0.6, "contrast": 0.3, "hue": 2.0, "saturation": 0.7}

    @jax.jit
    @jax.vmap
    def expected(key, image):
        geometry_key, colour_key = jax.random.split(key)
        image = warp(image, draw_geometry(geometry_key, 1.0, (8, 8), **warps))
        return recolour(image, draw_colour(colour_key, 1.0, **colours))

    y = augmented(KEY, X, 1.0, **warps | colours)
    np.testing.assert_allclose(y, expected(random.example_keys(KEY, 6), X), atol=1e-5)


def test_one_part_alone_and_none():
    np.testing.assert_array_equal(augmented(KEY, X, 1.0, **OFF), X)
    y = augmented(KEY, X, 1.0, **OFF | {"flip": True})
    flipped = np.all(y == X[:, :, ::-1], axis=(1, 2, 3))
    assert 0 < np.sum(flipped) < len(X)
    np.testing.assert_array_equal(y[~flipped], X[~flipped])
    added = augmented(KEY, X, 1.0, **OFF | {"brightness": 0.2}) - X
    assert np.all(added[:, 0, 0, 0] != 0)
    np.testing.assert_allclose(added, jnp.broadcast_to(added[:, :1, :1, :1], X.shape), atol=1e-6)


def test_an_example_depends_on_its_key_and_itself_alone():
    y = augmented(KEY, X, P)
    np.testing.assert_allclose(augmented(random.example_keys(KEY, 6)[3:5], X[3:5], P), y[3:5], atol=1e-5)
    np.testing.assert_array_equal(augmented(KEY, X.at[0].set(9.0), P)[1:], y[1:])


def test_one_key_gives_data_and_samples_the_same_transformations():
    """Then the augmentation is one affine map for both."""
    data, samples = X, jnp.roll(X, 1, axis=0)
    mixed = augmented(KEY, 0.25 * data + 0.75 * samples, P)
    apart = 0.25 * augmented(KEY, data, P) + 0.75 * augmented(KEY, samples, P)
    np.testing.assert_allclose(mixed, apart, atol=1e-5)
    assert np.abs(mixed - X).max() > 0.5


def test_float64_draws_the_same():
    with jax.enable_x64(True):
        y = augmented(KEY, X.astype(jnp.float64), P)
    assert y.dtype == jnp.float64
    np.testing.assert_allclose(y, augmented(KEY, X, P), atol=1e-4)


def test_one_program_serves_all_probabilities_in_loops_and_maps():
    """Training runs of three first probabilities, mapped and scanned, against a loop that calls one program."""
    move = functools.partial(adapt_probability, batch_size=6, images=24, target=0.0)

    def step(probability, i):
        y = ada(jax.random.fold_in(KEY, i), X, probability)
        return move(probability, jnp.mean(jnp.sign(jnp.sum(y, axis=(1, 2, 3))))), y

    starts = jnp.array([0.0, 0.4, 0.9])
    last, images = jax.jit(jax.vmap(lambda p: jax.lax.scan(step, p, jnp.arange(4))))(starts)
    augmented(KEY, X, starts[0])
    traced = len(TRACES)
    for j, p in enumerate(starts):
        for i in range(4):
            y = augmented(jax.random.fold_in(KEY, i), X, p)
            np.testing.assert_allclose(images[j, i], y, atol=1e-5)
            p = move(p, jnp.mean(jnp.sign(jnp.sum(y, axis=(1, 2, 3)))))
        np.testing.assert_allclose(last[j], p, atol=1e-6)
    assert len(TRACES) == traced


def test_gradient_penalties_go_through_it():
    """The critic's gradient, and that of R1 by a parameter of the critic, against differences."""
    with jax.enable_x64(True):
        x = X[:2, :6, :6].astype(jnp.float64)
        direction = jax.random.normal(jax.random.key(2), x.shape, jnp.float64)

        @jax.jit
        def evaluated(scale, t):
            """The logits' sum and its slope by t, R1's sum and its slope by the scale."""

            def penalty(scale):
                critic = lambda x: jnp.sum(jnp.sin(scale * ada(KEY, x, 0.9)), axis=(1, 2, 3))  # noqa: E731
                logits, norms = gan.penalised(critic, x + t * direction)
                return jnp.sum(norms), (jnp.sum(logits), jax.grad(lambda x: jnp.sum(critic(x)))(x + t * direction))

            (norms, (logits, gradient)), slope = jax.value_and_grad(penalty, has_aux=True)(scale)
            return logits, jnp.sum(direction * gradient), norms, slope

        h, (_, along, _, slope) = 1e-5, evaluated(1.5, 0.0)
        by_t = (evaluated(1.5, h)[0] - evaluated(1.5, -h)[0]) / (2 * h)
        by_scale = (evaluated(1.5 + h, 0.0)[2] - evaluated(1.5 - h, 0.0)[2]) / (2 * h)
        np.testing.assert_allclose(along, by_t, rtol=1e-7)
        np.testing.assert_allclose(slope, by_scale, rtol=1e-7)


def test_the_controller_crosses_in_the_images_it_is_told():
    step = jax.jit(functools.partial(adapt_probability, batch_size=32, images=1024))
    p, path = 0.0, []
    for _ in range(34):
        p = step(p, 0.7)
        path.append(float(p))
    np.testing.assert_array_equal(path, np.minimum(np.arange(1, 35) / 32, 1))
    for _ in range(34):
        p = step(p, 0.5)
        path.append(float(p))
    np.testing.assert_array_equal(path[34:], np.maximum(1 - np.arange(1, 35) / 32, 0))


def test_the_controller_by_the_papers_numbers():
    """500 000 images by 64 are 7812.5 steps; float32 sums them to within one."""
    move = functools.partial(adapt_probability, batch_size=64)
    length = jax.jit(lambda: jax.lax.while_loop(lambda s: s[0] < 1, lambda s: (move(s[0], 1.0), s[1] + 1), (0.0, 0)))
    assert abs(int(length()[1]) - 7813) <= 1
    np.testing.assert_allclose(move(0.5, 0.61), 0.5 + 64 / 500_000, rtol=1e-6)
    np.testing.assert_allclose(move(0.5, 0.59), 0.5 - 64 / 500_000, rtol=1e-6)
    assert move(0.5, 0.25, target=0.25) == 0.5


def test_the_controller_finds_the_target():
    """Overfitting that augmentation lowers: r = 1 - p settles where r is the target."""
    step = jax.jit(lambda p, _: (adapt_probability(p, 1 - p, batch_size=1, images=100, target=0.3), None))
    settled = jax.lax.scan(step, jnp.float32(0), None, 200)[0]
    assert abs(settled - 0.7) < 0.011


def test_refusals():
    with pytest.raises(ValueError, match=r"`x` must have shape \[any, any, any, any\], got \[8, 8, 3\]"):
        ada(KEY, X[0], 0.5)
    with pytest.raises(TypeError, match="`x` must be floating-point"):
        ada(KEY, X.astype(jnp.uint8), 0.5)
    with pytest.raises(TypeError, match="`key` must be a typed PRNG key"):
        ada(0, X, 0.5)
    for bad in (-0.1, 1.1, np.nan):
        with pytest.raises(ValueError, match=rf"`probability` must lie in \[0, 1\], got {bad}"):
            ada(KEY, X, bad)
        with pytest.raises(ValueError, match=rf"`probability` must lie in \[0, 1\], got {bad}"):
            adapt_probability(bad, 0.0, batch_size=1)
    with pytest.raises(ValueError, match=r"`probability` must have shape \[\], got \[6\]"):
        ada(KEY, X, jnp.full(6, 0.5))
    for name in OFF:
        with pytest.raises(ValueError, match=f"`{name}` must be a finite number of at least 0, got -1"):
            ada(KEY, X, 0.5, **{name: -1})
    for name in ("flip", "quarter_turns", "luma_flip"):
        with pytest.raises(ValueError, match=f"`{name}` must be True or False, got 0.5"):
            ada(KEY, X, 0.5, **{name: 0.5})
    with pytest.raises(ValueError, match=r"`sign` must have shape \[\], got \[6\]"):
        adapt_probability(0.5, jnp.ones(6), batch_size=6)
    with pytest.raises(ValueError, match=r"`sign` must lie in \[-1, 1\], got 2"):
        adapt_probability(0.5, 2.0, batch_size=6)
    with pytest.raises(ValueError, match=r"`target` must lie in \[-1, 1\], got 60"):
        adapt_probability(0.5, 0.0, batch_size=6, target=60)
    for name in ("batch_size", "images"):
        with pytest.raises(ValueError, match=f"`{name}` must be an integer of at least 1, got 0"):
            adapt_probability(0.5, 0.0, **{"batch_size": 1} | {name: 0})
