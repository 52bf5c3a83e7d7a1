"""Batches are pure functions of (data, seed, step): every property here is one that an iterator's state could
break."""

import gc
import subprocess
import sys
import threading

import numpy as np
import pytest

from jaxgen import data

N = 50


def numbered(n=N):
    return {"x": np.arange(n), "image": np.arange(n, dtype=np.uint8)[:, None, None, None]}


class Records:
    """Records by index, without __getitems__."""

    def __init__(self, n=N):
        self.n = n

    def __len__(self):
        return self.n

    def __getitem__(self, index):
        return {"x": np.asarray(index), "image": np.full((1, 1, 1), index, np.uint8)}


def of_arrays(n=N, **options):
    return data.batches(numbered(n), **options)


def of_records(n=N, **options):
    return data.stream(Records(n), **options)


both = pytest.mark.parametrize("make", [of_arrays, of_records])


@both
@pytest.mark.parametrize("batch_size", [1, 7, 10, 50, 64, 130])
def test_every_epoch_visits_every_example_once_in_an_order_of_its_own(make, batch_size):
    of_step = make(batch_size=batch_size, seed=3)
    steps = 4 * N // batch_size + 1
    epochs = np.concatenate([of_step(step)["x"] for step in range(steps)])[: 4 * N].reshape(4, N)
    np.testing.assert_array_equal(np.sort(epochs, axis=1), np.tile(np.arange(N), (4, 1)))
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert not np.array_equal(epochs[0], np.arange(N))


@both
def test_steps_in_any_order_and_far_away_give_the_same_batch(make):
    one, other = make(batch_size=8, seed=0), make(batch_size=8, seed=0)
    steps = [5, 10**9, 0, 5, 6, np.int64(12), 10**9]
    for step in steps:
        np.testing.assert_array_equal(one(step)["x"], other(step)["x"])
    np.testing.assert_array_equal(one(5)["x"], make(batch_size=8, seed=0)(5)["x"])


@both
def test_sequence_does_not_depend_on_the_batch_size(make):
    tens, fives = make(batch_size=10, seed=1), make(batch_size=5, seed=1)
    for step in range(12):
        np.testing.assert_array_equal(tens(step)["x"], np.concatenate([fives(2 * step)["x"], fives(2 * step + 1)["x"]]))


@both
def test_orders_of_seeds_are_unrelated(make):
    # Adding the epoch to the seed would make epoch 1 of seed 0 the epoch 0 of seed 1.
    orders = {(seed, e): tuple(make(batch_size=N, seed=seed)(e)["x"]) for seed in range(4) for e in range(4)}
    assert len(set(orders.values())) == 16


def test_first_places_are_uniform():
    first = [of_arrays(8, batch_size=8, seed=0)(epoch)["x"][0] for epoch in range(4000)]
    counts = np.bincount(first, minlength=8)
    assert ((counts - 500) ** 2 / 500).sum() < 24.3  # chi-squared with 7 degrees of freedom, p = 0.001


@both
@pytest.mark.parametrize("count", [1, 2, 4, 8])
def test_processes_share_one_global_batch(make, count):
    whole = make(batch_size=16, seed=5)
    parts = [make(batch_size=16, seed=5, process_index=i, process_count=count) for i in range(count)]
    for step in (0, 3, 77):
        np.testing.assert_array_equal(np.concatenate([part(step)["x"] for part in parts]), whole(step)["x"])


def test_order_is_the_same_in_another_process_and_version():
    # The one golden number here: a resumed run goes on with these batches whatever is upgraded meanwhile.
    code = f"import numpy as np; from jaxgen import data; print({TEN}(2)['x'])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    raw = np.random.Philox(key=np.array([7, 2], np.uint64)).random_raw(10)
    np.testing.assert_array_equal(eval(TEN)(2)["x"], np.argsort(raw))
    assert out.strip() == GOLDEN


TEN = "data.batches({'x': np.arange(10)}, batch_size=10, seed=7)"
GOLDEN = "[6 7 8 4 0 1 5 3 9 2]"


@both
def test_images_become_unit_and_rows_stay_together(make):
    batch = make(batch_size=20, seed=0)(1)
    assert batch["image"].dtype == np.float32
    np.testing.assert_array_equal(batch["image"][:, 0, 0, 0], batch["x"].astype(np.float32) / 127.5 - 1)
    raw = make(batch_size=20, seed=0, transform=lambda batch: batch)(1)
    assert raw["image"].dtype == np.uint8
    doubled = make(batch_size=20, seed=0, transform=lambda batch: batch["x"] * 2)(1)
    np.testing.assert_array_equal(doubled, batch["x"] * 2)


def test_batches_are_copies():
    arrays = numbered()
    of_step = data.batches(arrays, batch_size=N, seed=0)
    of_step(0)["x"][:] = -1
    np.testing.assert_array_equal(np.sort(of_step(0)["x"]), np.arange(N))


@both
def test_options_out_of_range_are_refused(make):
    for options, message in [
        ({"batch_size": 0}, r"`batch_size` must be an integer of at least 1, got 0"),
        (
            {"batch_size": 8, "process_count": 3},
            r"`batch_size` must be a multiple of `process_count`, 3, got 8",
        ),
        (
            {"batch_size": 8, "process_index": 2, "process_count": 2},
            r"`process_index` must lie in \[0, 2\), got 2",
        ),
        ({"batch_size": 8, "seed": -1}, r"`seed` must not be negative, got -1"),
        ({"batch_size": 8, "seed": 2**32}, r"`seed` must lie in \[0, 2\^32\)"),
    ]:
        with pytest.raises(ValueError, match=message):
            make(**{"seed": 0, **options})
    with pytest.raises(ValueError, match="at least one example"):
        make(0, batch_size=8, seed=0)
    of_step = make(batch_size=8, seed=0)
    with pytest.raises(ValueError, match=r"`step` must not be negative, got -1"):
        of_step(-1)
    with pytest.raises(TypeError, match=r"`step` must be an integer, got 1.0"):
        of_step(1.0)


def test_arrays_of_several_lengths_are_refused():
    with pytest.raises(ValueError, match=r"`arrays` must be .* lengths \{'x': 3, 'y': 4\}"):
        data.batches({"x": np.zeros(3), "y": np.zeros(4)}, batch_size=1, seed=0)
    with pytest.raises(ValueError, match=r"`arrays` must be at least one"):
        data.batches({}, batch_size=1, seed=0)
    with pytest.raises(ValueError, match=r"lengths \{'x': None\}"):
        data.batches({"x": np.float32(1)}, batch_size=1, seed=0)


def test_records_of_several_shapes_are_refused():
    ragged = [{"image": np.zeros((n, 1), np.uint8)} for n in (1, 2)]
    with pytest.raises(ValueError, match=r"`source` must have records of one shape, got 'image' of shapes"):
        data.stream(ragged, batch_size=2, seed=0)(0)


def test_stream_reads_what_load_holds(digits_dir):
    arrays = data.load("digits", split="test", data_dir=digits_dir)
    records = data.source("digits", split="test", data_dir=digits_dir)
    whole = data.stream(records, batch_size=len(records), seed=0, transform=lambda batch: batch)(3)

    def pairs(batch):
        return sorted(
            (image.tobytes(), int(label)) for image, label in zip(batch["image"], batch["label"], strict=True)
        )

    assert pairs(whole) == pairs(arrays)


def test_stream_takes_a_grain_map():
    import grain

    doubled = grain.MapDataset.source(Records()).map(lambda record: {"x": record["x"] * 2})
    batch = data.stream(doubled, batch_size=N, seed=0)(0)
    np.testing.assert_array_equal(np.sort(batch["x"]), 2 * np.arange(N))


def test_prefetched_is_the_same_function():
    plain, ahead = of_arrays(batch_size=8, seed=0), data.prefetched(of_arrays(batch_size=8, seed=0), ahead=3)
    for step in [0, 1, 2, 3, 9, 10, 3, 4, 4, 0]:
        np.testing.assert_array_equal(ahead(step)["x"], plain(step)["x"])


def test_prefetched_works_ahead_gives_errors_at_their_step_and_ends_its_threads():
    made = threading.Event()

    def batches(step):
        if step == 1:
            made.set()
            raise RuntimeError("step 1 is broken")
        return step

    before = threading.active_count()
    ahead = data.prefetched(batches, ahead=1)
    assert ahead(0) == 0
    assert made.wait(10)
    with pytest.raises(RuntimeError, match="step 1 is broken"):
        ahead(1)
    assert ahead(2) == 2
    threads = [thread for thread in threading.enumerate() if thread.name.startswith("jaxgen-data")]
    assert threads
    del ahead
    gc.collect()
    for thread in threads:
        thread.join(10)
    assert threading.active_count() <= before
    with pytest.raises(ValueError, match="`ahead` must be an integer of at least 1"):
        data.prefetched(batches, ahead=0)
