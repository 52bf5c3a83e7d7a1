"""What a run draws: grids of images and curves of metrics as PNG, for people; arrays, for programs.

Pillow and matplotlib are imported inside the functions: a program's ``--help`` needs neither.
"""

import json
import os
import uuid
from collections.abc import Callable, Sequence
from typing import IO, TYPE_CHECKING, Any

import numpy as np
from etils.epath import Path

from jaxgen import checks
from jaxgen.data import to_uint8
from jaxgen.typing import ArrayLike

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def save_grid(path: str | os.PathLike[str], images: ArrayLike, *, columns: int, smallest: int = 640) -> None:
    """Writes images as one PNG, row by row, enlarged in whole steps so that a person can look at it.

    Args:
        path: the file; written whole or not at all.
        images: [n, height, width, channels], none of them 0, floating in [-1, 1] (values beyond are clipped), 1 or 3
            channels.
        columns: images per row.
        smallest: pixels that the grid's longer side has at least.

    Raises:
        TypeError: the images are not floating-point.
        ValueError: the shape is wrong, there is no pixel, a value is NaN, or a number is not a positive integer.
        OSError: the file cannot be written.
    """
    from PIL import Image

    checks.positive_integer("columns", columns)
    checks.positive_integer("smallest", smallest)
    checks.shape("images", images, (None, None, None, None))
    pixels = to_uint8(images)
    n, height, width, channels = pixels.shape
    if not pixels.size or channels not in (1, 3):
        raise ValueError(f"`images` must be at least one image of 1 or 3 channels, got shape {list(pixels.shape)}")
    rows, gap = -(-n // columns), 2
    grid = np.full((rows * (height + gap) - gap, columns * (width + gap) - gap, channels), 96, np.uint8)
    for i, image in enumerate(pixels):
        top, left = i // columns * (height + gap), i % columns * (width + gap)
        grid[top : top + height, left : left + width] = image
    factor = max(1, -(-smallest // max(grid.shape[:2])))
    picture = Image.fromarray(grid.squeeze(-1) if channels == 1 else grid)
    picture = picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)
    _write(path, lambda file: picture.save(file, format="PNG"))


def save_film(path: str | os.PathLike[str], frames: Sequence[str | os.PathLike[str]]) -> None:
    """Stacks pictures from top to bottom into one PNG, the oldest on top: one row per moment of training.

    Args:
        path: the file; written whole or not at all.
        frames: files of pictures of one width and one mode, such as `save_grid` writes of the same samples again and
            again; at least one.

    Raises:
        ValueError: there is no frame, or their widths or modes differ.
        OSError: a file cannot be read or written.
    """
    from PIL import Image

    pictures: list[Image.Image] = []
    for frame in frames:
        with Path(frame).open("rb") as file, Image.open(file) as opened:
            pictures.append(opened.copy())
    if len({(picture.width, picture.mode) for picture in pictures}) != 1:
        found = [(picture.width, picture.mode) for picture in pictures]
        raise ValueError(f"`frames` must be at least one picture, all of one width and mode, got {found}")
    gap, mode = 8, pictures[0].mode
    height = sum(picture.height + gap for picture in pictures) - gap
    film = Image.new(mode, (pictures[0].width, height), (96,) * len(mode))
    for i, picture in enumerate(pictures):
        film.paste(picture, (0, sum(above.height + gap for above in pictures[:i])))
    _write(path, lambda file: film.save(file, format="PNG"))


def save_curves(path: str | os.PathLike[str], records: str | os.PathLike[str], names: Sequence[str]) -> None:
    """Draws metrics against steps, one panel each, from a file of JSON lines as `jaxgen.log.Log` writes them.

    Args:
        path: the PNG file; written whole or not at all.
        records: the file of JSON lines, each holding "step".
        names: the metrics to draw; those of which no line holds a number are left out, and where there is none, no file
            is written. A null is a gap in the curve.

    Raises:
        OSError: a file cannot be read or written.
        ValueError: a line is not JSON.
    """
    from matplotlib.figure import Figure

    lines = [json.loads(line) for line in Path(records).read_text().splitlines()]
    held = [name for name in names if any(line.get(name) is not None for line in lines)]
    if not held:
        return
    # A Figure of its own, not pyplot: no display, no global state.
    figure = Figure(figsize=(5 * len(held), 3.5), layout="constrained")
    for axes, name in zip(figure.subplots(1, len(held), squeeze=False)[0], held, strict=True):
        points = [(line["step"], line[name]) for line in lines if name in line]
        steps, values = np.array(points, np.float64).T  # None becomes NaN
        axes.plot(steps, values, linewidth=1)
        axes.set_xlabel("step")
        axes.set_title(name.replace("_", " "))
        axes.grid(alpha=0.3)
        if np.nanmin(values) > 0:
            axes.set_yscale("log")
    save_figure(path, figure)


def save_figure(path: str | os.PathLike[str], figure: "Figure") -> None:
    """Writes a figure of matplotlib's as a PNG, whole or not at all.

    Args:
        path: the file.
        figure: a ``matplotlib.figure.Figure``.

    Raises:
        OSError: the file cannot be written.
    """
    _write(path, lambda file: figure.savefig(file, format="png", dpi=120))


def save_arrays(path: str | os.PathLike[str], **arrays: np.ndarray) -> None:
    """Writes arrays by name as one compressed .npz file, whole or not at all.

    Args:
        path: the file.
        arrays: any shapes, of NumPy's own dtypes: a bfloat16 would come back as bytes, an object not without pickle.

    Raises:
        ValueError: an array is of another dtype.
        OSError: the file cannot be written.
    """
    host: dict[str, Any] = {name: np.asarray(array) for name, array in arrays.items()}
    for name, array in host.items():
        if array.dtype.hasobject or array.dtype.isbuiltin == 2:  # 2: registered by a library, such as ml_dtypes
            raise ValueError(f"`{name}` must be of one of NumPy's own dtypes, got {array.dtype}")

    _write(path, lambda file: np.savez_compressed(file, **host))


def _write(path: str | os.PathLike[str], save: Callable[[IO[bytes]], object]) -> None:
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    # A name of its own: two programs that write one file at once do not mix.
    temporary = target.with_name(f".{target.name}-{uuid.uuid4().hex}")
    try:
        with temporary.open("wb") as file:
            save(file)
        temporary.replace(target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
