"""Images are uint8 on disk and in memory, and float32 in [-1, 1] inside the maths.

    unit  = uint8 / 127.5 - 1                               (1)
    uint8 = round(clip((unit + 1) 127.5, 0, 255))           (2)

(2) inverts (1) exactly on all 256 values. Images stay uint8 until a batch has been gathered: a quarter of the
memory, and a quarter of the bytes that the gather moves.
"""

from typing import Any

import numpy as np

from jaxgen import checks
from jaxgen.typing import ArrayLike


def to_unit(images: np.ndarray) -> np.ndarray:
    """Converts uint8 images to float32 in [-1, 1], Eq. 1.

    Args:
        images: uint8, of any shape.

    Returns:
        float32 of the same shape.

    Raises:
        TypeError: ``images`` are not uint8; numbers of another type would be of another range.

    >>> to_unit(np.array([0, 255], np.uint8))
    array([-1.,  1.], dtype=float32)
    """
    images = np.asarray(images)
    if images.dtype != np.uint8:
        raise TypeError(f"`images` must be uint8, got dtype {images.dtype}")
    # Division, not multiplication by 1/127.5: 255 must become 1 exactly.
    unit = np.divide(images, np.float32(127.5), dtype=np.float32)
    unit -= 1
    return unit


def to_uint8(images: ArrayLike) -> np.ndarray:
    """Converts floating-point images in [-1, 1] to uint8, Eq. 2; what lies outside is clipped.

    Args:
        images: floating-point, of any shape, on the host or on a device.

    Returns:
        uint8 of the same shape.

    Raises:
        TypeError: ``images`` are not floating-point.
        ValueError: ``images`` hold a NaN, which no grey value stands for.

    >>> to_uint8(np.array([-1.0, 0.0, 1.0, 1.5]))
    array([  0, 128, 255, 255], dtype=uint8)
    """
    array = np.asarray(images)
    # bfloat16 is no sub-type of np.floating: what is refused is what to_unit would take, or another kind of
    # number.
    if array.dtype.kind in "iubcOSU":
        raise TypeError(f"`images` must be floating-point (images in [-1, 1]), got dtype {array.dtype}")
    array = array.astype(np.float32)  # a copy: the rest works in place
    if np.isnan(array).any():
        raise ValueError(f"`images` must be numbers, got {np.isnan(array).sum()} NaN of {array.size} values")
    array += 1
    array *= 127.5
    np.clip(array, 0, 255, out=array)
    return np.rint(array, out=array).astype(np.uint8)


def centred_square(image: np.ndarray, size: int) -> np.ndarray:
    """Cuts the largest square from an image's middle and brings it to ``size`` pixels a side.

    By bicubic interpolation, and where it shrinks by a bicubic filter as wide as the pixels to come, so that nothing
    aliases.

    Args:
        image: uint8 [height, width, 3], or with 1 channel.
        size: at least 1.

    Returns:
        uint8 [size, size, channels].

    Raises:
        TypeError: ``image`` is not uint8.
        ValueError: it is no such image, or ``size`` is out of range.
    """
    from PIL import Image

    if image.dtype != np.uint8:
        raise TypeError(f"`image` must be uint8, got dtype {image.dtype}")
    if image.ndim != 3 or image.shape[2] not in (1, 3) or 0 in image.shape:
        raise ValueError(f"`image` must have shape [height, width, 1 or 3], got {list(image.shape)}")
    checks.positive_integer("size", size)
    height, width, channels = image.shape
    side = min(height, width)
    left, top = (width - side) // 2, (height - side) // 2
    square = image[top : top + side, left : left + side]
    picture = Image.fromarray(square[..., 0] if channels == 1 else square)
    return np.asarray(picture.resize((size, size), Image.Resampling.BICUBIC)).reshape(size, size, channels)


def unit_images(batch: dict[str, np.ndarray]) -> dict[str, Any]:
    """Converts the uint8 arrays of a batch, which are its images, by ``to_unit``."""
    return {name: to_unit(array) if array.dtype == np.uint8 else array for name, array in batch.items()}
