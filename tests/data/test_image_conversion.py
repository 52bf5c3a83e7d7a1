import jax.numpy as jnp
import numpy as np
import pytest

from jaxgen import data


def test_all_grey_values_there_and_back():
    grey = np.arange(256, dtype=np.uint8)
    unit = data.to_unit(grey)
    assert unit.dtype == np.float32
    np.testing.assert_allclose(unit, grey / 127.5 - 1, atol=2**-24, rtol=0)
    assert (unit[0], unit[-1]) == (-1, 1)
    np.testing.assert_array_equal(data.to_uint8(unit), grey)


def test_to_uint8_rounds_clips_and_takes_any_float():
    assert data.to_uint8(np.array([-7.0, 0.999, 7.0, np.inf, -np.inf])).tolist() == [0, 255, 255, 255, 0]
    assert data.to_uint8(np.array([0.3 / 127.5 - 1, 0.7 / 127.5 - 1])).tolist() == [0, 1]
    for dtype in (jnp.bfloat16, jnp.float16, jnp.float32):
        assert data.to_uint8(jnp.array([-1, 1], dtype)).tolist() == [0, 255]


def test_argument_is_left_alone():
    image = np.zeros(4, np.float32)
    data.to_uint8(image)
    assert (image == 0).all()


def test_wrong_types_are_refused():
    with pytest.raises(TypeError, match="`images` must be uint8, got dtype float32"):
        data.to_unit(np.zeros(3, np.float32))
    with pytest.raises(TypeError, match=r"`images` must be floating-point .*got dtype uint8"):
        data.to_uint8(np.zeros(3, np.uint8))
    with pytest.raises(TypeError, match="got dtype complex64"):
        data.to_uint8(np.zeros(3, np.complex64))
    with pytest.raises(ValueError, match="`images` must be numbers, got 1 NaN of 2 values"):
        data.to_uint8(np.array([0.0, np.nan]))


def test_squares_are_cut_from_the_middle_and_do_not_alias():
    image = np.zeros((10, 16, 3), np.uint8)
    image[:, 3:13] = 200
    np.testing.assert_array_equal(data.centred_square(image, 10), 200)
    np.testing.assert_array_equal(data.centred_square(image, 5), 200)
    grey = data.centred_square(image[..., :1], 3)
    np.testing.assert_array_equal(grey, np.full((3, 3, 1), 200))
    checkerboard = np.indices((64, 64)).sum(0)[..., None].astype(np.uint8) % 2 * 255
    assert np.ptp(data.centred_square(checkerboard, 8)[2:6, 2:6]) <= 16
    with pytest.raises(TypeError, match="`image` must be uint8, got dtype float32"):
        data.centred_square(image.astype(np.float32), 4)
    with pytest.raises(ValueError, match=r"`image` must have shape \[height, width, 1 or 3\], got \[10, 16, 2\]"):
        data.centred_square(image[..., :2], 4)
    with pytest.raises(ValueError, match="`size` must be an integer of at least 1, got 0"):
        data.centred_square(image, 0)
