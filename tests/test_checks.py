"""Every refusal names the argument, what came and what was expected."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgen import checks

INF, NAN = np.inf, np.nan


@pytest.mark.parametrize(
    ("check", "arguments", "error", "message"),
    [
        (checks.shape, (np.ones((2, 3)), (None, 4)), ValueError, "`x` must have shape [any, 4], got [2, 3]"),
        (checks.shape, (np.ones(2), (2, None)), ValueError, "`x` must have shape [2, any], got [2]"),
        (checks.shape, (1.0, (1,)), ValueError, "`x` must have shape [1], got []"),
        (checks.shape, (np.ones(1), ()), ValueError, "`x` must have shape [], got [1]"),
        (checks.same_shape, (np.ones((2, 1)), "y", np.ones(2)), ValueError, "`x` must have the shape of `y`, [2], got [2, 1]"),
        (checks.rank_at_least, (np.ones(4), 2), ValueError, "`x` must have at least 2 axes, got shape [4]"),
        (checks.floating, (np.zeros(2, np.uint8),), TypeError, "`x` must be floating-point (images, for one, in [-1, 1]), got dtype uint8"),
        (checks.floating, (jnp.ones(2, bool),), TypeError, "`x` must be floating-point (images, for one, in [-1, 1]), got dtype bool"),
        (checks.floating, (np.ones(2, np.complex64),), TypeError, "got dtype complex64"),
        (checks.floating, (jax.random.key(0),), TypeError, "got dtype key<fry>"),
        (checks.key, (jnp.zeros(2, jnp.uint32),), TypeError, "`x` must be a typed PRNG key, jax.random.key(seed), got uint32[2]"),
        (checks.key, (0,), TypeError, "`x` must be a typed PRNG key, jax.random.key(seed), got int"),
        (checks.key, (None,), TypeError, "got NoneType"),
        (checks.interval, (1.5, 0, 1), ValueError, "`x` must lie in [0, 1], got 1.5"),
        (checks.interval, (np.float32(-0.25), 0.0, INF), ValueError, "`x` must lie in [0, inf], got -0.25"),
        (checks.interval, (jnp.array([0.5, 3]), 0, 1), ValueError, "`x` must lie in [0, 1], got values from 0.5 to 3"),
        (checks.interval, ([-2, 1], 0, 1), ValueError, "`x` must lie in [0, 1], got values from -2 to 1"),
        (checks.interval, (NAN, -INF, INF), ValueError, "`x` must lie in [-inf, inf], got nan"),
        (checks.interval, ([NAN, 0], -INF, INF), ValueError, "`x` must lie in [-inf, inf], got values that are not finite"),
        (checks.finite, (INF,), ValueError, "`x` must be finite, got inf"),
        (checks.finite, (jnp.array([1, NAN]),), ValueError, "`x` must be finite, got values that are not finite"),
        (checks.positive, (0.0,), ValueError, "`x` must be above 0 and finite, got 0"),
        (checks.positive, (np.array([-1, 2]),), ValueError, "`x` must be above 0 and finite, got values from -1 to 2"),
        (checks.positive, (INF,), ValueError, "`x` must be above 0 and finite, got inf"),
        (checks.positive, ([1, NAN],), ValueError, "`x` must be above 0 and finite, got values that are not finite"),
        (checks.positive_integer, (0,), ValueError, "`x` must be an integer of at least 1, got 0"),
        (checks.positive_integer, (np.int64(-3),), ValueError, "`x` must be an integer of at least 1, got np.int64(-3)"),
        (checks.positive_integer, (2.0,), ValueError, "`x` must be an integer of at least 1, got 2.0"),
        (checks.positive_integer, (True,), ValueError, "`x` must be an integer of at least 1, got True"),
        (checks.positive_integer, (np.bool_(True),), ValueError, "`x` must be an integer of at least 1, got np.True_"),
        (checks.positive_integer, ("3",), ValueError, "`x` must be an integer of at least 1, got '3'"),
        (checks.positive_integer, (None,), ValueError, "`x` must be an integer of at least 1, got None"),
    ],
)  # fmt: skip
def test_refuses(check, arguments, error, message):
    with pytest.raises(error, match=re.escape(message) + "$"):
        check("x", *arguments)


@pytest.mark.parametrize(
    ("check", "arguments"),
    [
        (checks.shape, (np.ones((2, 3)), (2, 3))),
        (checks.shape, (np.ones((0, 3)), (None, 3))),
        (checks.shape, (1.0, ())),
        (checks.same_shape, (np.ones(2), "y", jnp.zeros(2, int))),
        (checks.rank_at_least, (np.ones((2, 2)), 2)),
        (checks.rank_at_least, (np.ones((2, 2, 2)), 2)),
        *((checks.floating, (jnp.ones(2, dtype),)) for dtype in (jnp.float32, jnp.float16, jnp.bfloat16)),
        (checks.floating, (np.ones(2, np.float64),)),
        (checks.floating, (1.0,)),
        (checks.key, (jax.random.key(0),)),
        (checks.key, (jax.random.split(jax.random.key(0, impl="rbg"), 3),)),
        (checks.interval, (0, 0, 1)),
        (checks.interval, (np.float32(1), 0, 1)),
        (checks.interval, (jnp.array([[0.0, 1.0]]), 0, 1)),
        (checks.interval, (INF, 0, INF)),
        (checks.interval, ([], 0, 1)),
        (checks.positive, (1e-30,)),
        (checks.positive, (jnp.array([1, 2]),)),
        (checks.positive_integer, (1,)),
        (checks.positive_integer, (np.uint8(3),)),
    ],
)
def test_accepts(check, arguments):
    check("x", *arguments)


def test_shapes_and_dtypes_are_refused_while_tracing():
    for check, arguments, error in (
        (checks.shape, ((3,),), ValueError),
        (checks.same_shape, ("y", np.ones(3)), ValueError),
        (checks.rank_at_least, (2,), ValueError),
        (checks.floating, (), TypeError),
        (checks.key, (), TypeError),
    ):
        with pytest.raises(error, match="`x` must"):
            jax.eval_shape(lambda x, check=check, arguments=arguments: check("x", x, *arguments), jnp.zeros(2, int))


def test_values_that_are_not_known_yet_are_not_looked_at():
    def traced(x):
        checks.interval("x", x, 0, 1)
        checks.positive("x", x)
        return x

    assert jax.jit(traced)(-2.0) == -2
    assert jax.grad(traced)(-2.0) == 1
    np.testing.assert_array_equal(jax.vmap(traced)(jnp.array([-1.0, 2.0])), [-1, 2])
