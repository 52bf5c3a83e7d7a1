"""Pictures hold every pixel where it belongs, arrays every bit, and no file is ever half written."""

import contextlib
import json
import resource

import jax.numpy as jnp
import matplotlib.figure
import numpy as np
import pytest
from PIL import Image

from jaxgen.images import save_arrays, save_curves, save_film, save_grid


def noise(*shape):
    """Images of random levels, as uint8 and in [-1, 1]."""
    levels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    return levels, (levels / 127.5 - 1).astype(np.float32)


def read(path):
    with Image.open(path) as picture:
        assert picture.format == "PNG"
        return np.asarray(picture)


@pytest.mark.parametrize(
    ("shape", "columns", "smallest", "factor"),
    [
        ((5, 3, 4, 1), 2, 40, 4),  # 13 x 10 before it is enlarged; one place stays empty
        ((6, 4, 3, 3), 3, 39, 3),  # 10 x 13: enlarged to 39 exactly, no place empty
        ((6, 4, 3, 3), 3, 40, 4),
        ((2, 5, 5, 3), 4, 10, 1),  # never made smaller
        ((1, 2, 2, 1), 1, 1, 1),
    ],
)
def test_each_pixel_of_a_grid_is_where_it_belongs(tmp_path, shape, columns, smallest, factor):
    levels, images = noise(*shape)
    save_grid(tmp_path / "grid.png", images, columns=columns, smallest=smallest)
    n, height, width, channels = shape
    rows = (n + columns - 1) // columns
    wanted = np.empty((rows * height + (rows - 1) * 2, columns * width + (columns - 1) * 2, channels), np.uint8)
    for y, x in np.ndindex(wanted.shape[:2]):
        (row, dy), (column, dx) = divmod(y, height + 2), divmod(x, width + 2)
        i = row * columns + column
        wanted[y, x] = levels[i, dy, dx] if dy < height and dx < width and i < n else 96
    wanted = wanted.repeat(factor, axis=0).repeat(factor, axis=1)
    np.testing.assert_array_equal(read(tmp_path / "grid.png"), wanted[..., 0] if channels == 1 else wanted)


@pytest.mark.parametrize("channels", [1, 3])
def test_a_film_holds_its_frames_from_top_to_bottom(tmp_path, channels):
    frames = [tmp_path / f"{i}.png" for i in range(3)]
    for i, frame in enumerate(frames):
        save_grid(frame, np.roll(noise(2, 3 + i, 4, channels)[1], i), columns=2, smallest=10)
    save_film(tmp_path / "made" / "film.png", frames)
    rows = []
    for frame in frames:
        rows += [read(frame), np.full_like(read(frame)[:1], 96).repeat(8, axis=0)]
    np.testing.assert_array_equal(read(tmp_path / "made" / "film.png"), np.concatenate(rows[:-1]))


def test_a_film_of_no_frames_or_of_frames_of_other_widths_is_refused(tmp_path):
    for i in (1, 2):
        save_grid(tmp_path / f"{i}.png", noise(i, 4, 4, 1)[1], columns=i, smallest=4)
    for frames in ([], [tmp_path / "1.png", tmp_path / "2.png"]):
        with pytest.raises(ValueError, match="`frames` must be at least one picture, all of one width and mode, got"):
            save_film(tmp_path / "film.png", frames)
    assert not (tmp_path / "film.png").exists()


def test_values_beyond_the_range_are_clipped_and_any_floating_dtype_will_do(tmp_path):
    images = jnp.array([-jnp.inf, -1.5, -1, 1, 1.5, jnp.inf], jnp.bfloat16).reshape(1, 1, 6, 1)
    save_grid(tmp_path / "made" / "grid.png", images, columns=1, smallest=6)
    assert read(tmp_path / "made" / "grid.png").tolist() == [[0, 0, 0, 255, 255, 255]]


@pytest.mark.parametrize(
    ("images", "options", "error", "message"),
    [
        (np.zeros((8, 8, 1)), {}, ValueError, r"`images` must have shape \[any, any, any, any\], got \[8, 8, 1\]"),
        (np.zeros((1, 8, 8, 2)), {}, ValueError, r"`images` must be .* 1 or 3 channels, got shape \[1, 8, 8, 2\]"),
        (np.zeros((0, 8, 8, 3)), {}, ValueError, r"`images` must be at least one image .*\[0, 8, 8, 3\]"),
        (np.zeros((1, 0, 0, 3)), {}, ValueError, r"`images` must be at least one image .*\[1, 0, 0, 3\]"),
        (np.full((1, 2, 2, 1), np.nan), {}, ValueError, "`images` must be numbers, got 4 NaN"),
        (np.zeros((1, 2, 2, 1), np.uint8), {}, TypeError, "`images` must be floating-point"),
        (np.zeros((1, 2, 2, 1)), {"columns": 0}, ValueError, "`columns` must be .* at least 1, got 0"),
        (np.zeros((1, 2, 2, 1)), {"smallest": 0.5}, ValueError, r"`smallest` must be .* at least 1, got 0\.5"),
    ],
)
def test_what_is_no_grid_is_refused_by_name_before_anything_is_written(tmp_path, images, options, error, message):
    with pytest.raises(error, match=message):
        save_grid(tmp_path / "made" / "grid.png", images, **{"columns": 2, **options})
    assert not list(tmp_path.iterdir())


@pytest.fixture
def drawn(monkeypatch):
    """The panels of the figures that are saved."""
    panels, save = [], matplotlib.figure.Figure.savefig

    def savefig(figure, *args, **options):
        panels.extend(figure.axes)
        save(figure, *args, **options)

    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", savefig)
    return panels


def write_lines(path, *lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_curves_show_what_is_there(tmp_path, drawn):
    records = write_lines(
        tmp_path / "metrics.jsonl",
        {"step": 1, "loss": 4, "log_p": -1.0, "norm": None},
        {"step": 2, "loss": None, "log_p": 3.0, "norm": None},
        {"step": 5, "loss": 2.0, "sampled": 0.5},
    )
    save_curves(tmp_path / "curves.png", records, ("loss", "absent", "norm", "log_p", "sampled"))
    assert read(tmp_path / "curves.png").ndim == 3
    assert [axes.get_title() for axes in drawn] == ["loss", "log p", "sampled"]
    curves = [axes.get_lines()[0].get_xydata() for axes in drawn]
    for got, wanted in zip(curves, [[(1, 4), (2, np.nan), (5, 2)], [(1, -1), (2, 3)], [(5, 0.5)]], strict=True):
        np.testing.assert_array_equal(got, wanted)
    assert [axes.get_yscale() for axes in drawn] == ["log", "linear", "log"]


def test_no_curve_is_no_file(tmp_path):
    records = write_lines(tmp_path / "metrics.jsonl", {"step": 1, "loss": None})
    save_curves(tmp_path / "curves.png", records, ("loss", "norm"))
    assert list(tmp_path.iterdir()) == [records]


def test_arrays_come_back_bit_by_bit(tmp_path):
    arrays = {
        "image": np.array([[0x7FC00001, 0x80000000, 0x00000001]], np.uint32).view(np.float32),  # NaN, -0, subnormal
        "label": np.arange(6).reshape(2, 3)[:, ::-1],
        "half": np.float16([0.1, -np.inf]),
        "scalar": np.array(True),
        "empty": np.empty((0, 3), ">i2"),
        "names": np.array(["three", "seven"]),
    }
    save_arrays(tmp_path / "made" / "drawn.npz", **arrays)
    with np.load(tmp_path / "made" / "drawn.npz", allow_pickle=False) as found:
        assert sorted(found) == sorted(arrays)
        for name, array in arrays.items():
            assert (found[name].dtype, found[name].shape) == (array.dtype, array.shape)
            assert found[name].tobytes() == array.tobytes()


@pytest.mark.parametrize("array", [np.array([{}]), np.zeros((), [("a", object)]), jnp.zeros(2, jnp.bfloat16)])
def test_arrays_that_would_not_come_back_are_refused_by_name(tmp_path, array):
    with pytest.raises(ValueError, match="`label` must be of one of NumPy's own dtypes, got"):
        save_arrays(tmp_path / "drawn.npz", image=np.zeros(3), label=array)
    assert not list(tmp_path.iterdir())


@contextlib.contextmanager
def full_disk():
    """No file can grow beyond 50 bytes."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def grid(path):
    save_grid(path, noise(9, 16, 16, 3)[1], columns=3)


def curves(path):
    save_curves(path, write_lines(path.parent.parent / "lines", {"step": 1, "a": 1.0}), ("a",))


def arrays(path):
    save_arrays(path, image=noise(9, 16, 16, 3)[1])


@pytest.mark.parametrize("save", [grid, curves, arrays])
def test_nothing_is_half_written(tmp_path, save):
    path = tmp_path / "made" / "file"
    with full_disk(), pytest.raises(OSError, match="too large"):
        save(path)
    assert not list(path.parent.iterdir())
    path.write_text("precious")
    with full_disk(), pytest.raises(OSError, match="too large"):
        save(path)
    assert path.read_text() == "precious"
    neighbour = path.with_name("file.tmp")
    neighbour.write_text("a stranger's")
    save(path)
    assert path.stat().st_size > 100
    assert neighbour.read_text() == "a stranger's"
    assert sorted(path.parent.iterdir()) == [path, neighbour]
    with pytest.raises(IsADirectoryError):
        save(path.parent)
    assert sorted(path.parent.iterdir()) == [path, neighbour]
    assert not [entry for entry in tmp_path.iterdir() if entry.name not in ("made", "lines")]
