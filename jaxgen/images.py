"""What a run draws: grids of images and curves of metrics as PNG, for people; arrays, for programs.

Pillow and matplotlib are imported inside the functions: a program's ``--help`` needs neither.
"""

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from jaxgen import checks
from jaxgen.data import to_uint8
from jaxgen.typing import ArrayLike


def save_grid(path: str | os.PathLike[str], images: ArrayLike, *, columns: int, smallest: int = 640) -> None:
    """Writes images as one PNG, row by row, enlarged in whole steps so that a person can look at it.

    Args:
        path: the file; written whole or not at all.
        images: [n, height, width, channels], n at least 1, floating in [-1, 1] (values beyond are clipped), 1 or 3
            channels.
        columns: images per row.
        smallest: pixels that the grid's longer side should at least have.

    Raises:
        ValueError: the shape is wrong, there is no image, or values are not finite.
        OSError: the file cannot be written.
    """
    from PIL import Image

    checks.positive_integer("columns", columns)
    checks.shape("images", images, (None, None, None, None))
    pixels = to_uint8(images)
    n, height, width, channels = pixels.shape
    if n < 1 or channels not in (1, 3):
        raise ValueError(f"`images` must be at least one image of 1 or 3 channels, got shape {list(pixels.shape)}")
    rows, gap = -(-n // columns), 2
    grid = np.full((rows * (height + gap) - gap, columns * (width + gap) - gap, channels), 96, np.uint8)
    for i, image in enumerate(pixels):
        top, left = i // columns * (height + gap), i % columns * (width + gap)
        grid[top : top + height, left : left + width] = image
    factor = max(1, -(-smallest // max(grid.shape[:2])))
    picture = Image.fromarray(grid.squeeze(-1) if channels == 1 else grid)
    picture = picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)
    _write(path, lambda temporary: picture.save(temporary, format="PNG"))


def save_curves(path: str | os.PathLike[str], records: str | os.PathLike[str], names: Sequence[str]) -> None:
    """Draws metrics against steps, one panel each, from a file of JSON lines as `jaxgen.log.Log` writes them.

    Args:
        path: the PNG file; written whole or not at all.
        records: the file of JSON lines, each holding "step".
        names: the metrics to draw; those that no line holds are left out.

    Raises:
        OSError: a file cannot be read or written.
    """
    from matplotlib.figure import Figure

    lines = [json.loads(line) for line in Path(records).read_text().splitlines()]
    held = [name for name in names if any(name in line for line in lines)]
    if not held:
        return
    # A Figure of its own, not pyplot: no display, no global state.
    figure = Figure(figsize=(5 * len(held), 3.5), layout="constrained")
    for axes, name in zip(figure.subplots(1, len(held), squeeze=False)[0], held, strict=True):
        points = [(line["step"], line[name]) for line in lines if name in line]
        axes.plot(*zip(*points, strict=True), linewidth=1)
        axes.set_xlabel("step")
        axes.set_title(name.replace("_", " "))
        axes.grid(alpha=0.3)
        if min(value for _, value in points) > 0:
            axes.set_yscale("log")
    _write(path, lambda temporary: figure.savefig(temporary, format="png", dpi=120))


def save_arrays(path: str | os.PathLike[str], **arrays: np.ndarray) -> None:
    """Writes arrays by name as one compressed .npz file, whole or not at all.

    Args:
        path: the file.
        arrays: any shapes.

    Raises:
        OSError: the file cannot be written.
    """

    def save(temporary: Path) -> None:
        with temporary.open("wb") as file:
            np.savez_compressed(file, allow_pickle=False, **arrays)

    _write(path, save)


def _write(path: str | os.PathLike[str], save: Callable[[Path], None]) -> None:
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    try:
        save(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
