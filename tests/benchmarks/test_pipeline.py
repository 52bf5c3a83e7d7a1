"""The input pipeline as it is measured: the same images with and without threads, and no work left for a later run."""

import itertools
import threading

import numpy as np
import pytest

from benchmarks import pipeline, rounds
from jaxgen import data


@pytest.fixture(autouse=True)
def few(monkeypatch):
    """Small sets, of names that are registered once."""
    pipeline.written.cache_clear()
    for name, images in pipeline.SETS.items():
        monkeypatch.setitem(pipeline.SETS, name, images._replace(examples=24))


def test_digits_are_batches_of_jaxgen_data(tmp_path):
    work = pipeline.digits(pipeline.BATCHES * 16)
    arrays = data.load("digits", split="train", data_dir=tmp_path)
    of_step = data.batches(arrays, batch_size=16, seed=0)
    for run in range(2):  # the second goes on where the first ends
        np.testing.assert_array_equal(work.run(), of_step((run + 1) * pipeline.BATCHES - 1)["image"])


@pytest.mark.parametrize("case", pipeline.cases(quick=True)[1:], ids=lambda case: case.name)
def test_threads_change_nothing(case):
    works = {name: side(2 * pipeline.BATCHES) for name, side in case.sides.items()}
    outputs = {name: work.outputs(work.run()) for name, work in works.items()}
    size = case.settings["size"]
    assert outputs["jaxgen"].shape == (2, size, size, 3)
    assert outputs["jaxgen"].std() > 0.2
    assert set(rounds.check_outputs(outputs, case).values()) == {1.0}


def test_a_run_makes_its_own_batches_and_no_more():
    made, lock = [], threading.Lock()

    def of_step(step):
        with lock:
            made.append(step)
        return {"image": np.full(2, step)}

    work = pipeline.read(of_step, ahead=4)
    last = [work.run()[0] for _ in range(2)]
    assert last == [pipeline.BATCHES - 1, 2 * pipeline.BATCHES - 1]
    assert sorted(made) == list(range(2 * pipeline.BATCHES))


def test_files_are_as_long_as_photographs():
    """CIFAR-10's are of 2.3 kB as PNG; photographs take from 1.5 to 4 bits a pixel as JPEG."""
    for name, bits in (("records-32", (16, 24)), ("records-256", (1.5, 4))):
        images = pipeline.SETS[name]
        lengths = [len(file) for file in itertools.islice(pipeline.pictures(images), 4)]
        assert bits[0] < 8 * np.mean(lengths) / (images.height * images.width) < bits[1]
