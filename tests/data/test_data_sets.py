"""Data sets by name: what is stored is scikit-learn's, and whatever is wrong with a data set is said."""

import os
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest
from sklearn.datasets import load_digits

from jaxgen import data


def test_importing_data_imports_none_of_the_heavy_libraries():
    heavy = {"tensorflow_datasets", "grain", "sklearn", "orbax", "PIL", "tensorflow"}
    code = f"import sys, jaxgen.data; print({heavy} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "set()"


def test_digits_are_scikit_learns_and_invertible(digits_dir):
    raw = load_digits()
    parts = [data.load("digits", split=split, data_dir=digits_dir) for split in ("train", "test")]
    assert all(part["image"].dtype == np.uint8 and part["label"].dtype == np.int32 for part in parts)
    stored = np.concatenate([part["image"] for part in parts])
    labels = np.concatenate([part["label"] for part in parts])
    values = np.round(stored[..., 0] * (16 / 255)).reshape(-1, 64)

    def ordered(images, labels):
        rows = np.concatenate([images, labels[:, None]], axis=1)
        return rows[np.lexsort(rows.T)]

    np.testing.assert_array_equal(ordered(values, labels), ordered(raw.data, raw.target))


def test_split_is_stratified_disjoint_and_in_file_order(digits_dir):
    raw = load_digits()
    train, test = (data.load("digits", split=split, data_dir=digits_dir) for split in ("train", "test"))
    assert (len(train["label"]), len(test["label"])) == (1438, 359)
    share = np.bincount(test["label"]) / np.bincount(raw.target)
    np.testing.assert_allclose(share, 0.2, atol=0.01)
    # Walk the file: every digit is next in line either in the one or in the other.
    scaled = np.round(raw.images * 255 / 16).astype(np.uint8)[..., None]
    seen = np.zeros(10, int)
    position = {"train": 0, "test": 0}
    for image, label in zip(scaled, raw.target, strict=True):
        name, part = ("test", test) if seen[label] % 5 == 2 else ("train", train)
        np.testing.assert_array_equal(part["image"][position[name]], image)
        assert part["label"][position[name]] == label
        seen[label] += 1
        position[name] += 1


def test_loading_again_is_fast(digits_dir):
    start = time.perf_counter()
    data.load("digits", split="train", data_dir=digits_dir)
    assert time.perf_counter() - start < 3  # 0.2 s on an idle core


def test_source_and_load_agree_and_slices_work(digits_dir, monkeypatch):
    monkeypatch.setattr("jaxgen.data.records._CHUNK", 100)  # several chunks, the last one short
    arrays = data.load("digits", split="test", data_dir=digits_dir)
    records = data.source("digits", split="test[10:20]", data_dir=digits_dir)
    assert len(records) == 10
    np.testing.assert_array_equal(np.stack([record["image"] for record in records]), arrays["image"][10:20])
    np.testing.assert_array_equal(records[-1]["image"], arrays["image"][19])
    whole = data.source("digits", split="test", data_dir=digits_dir)
    np.testing.assert_array_equal(np.stack([record["image"] for record in whole]), arrays["image"])
    assert "digits" in repr(records)
    with pytest.raises(IndexError, match=r"`index` must lie within 10 records, got 10"):
        records[10]


def test_default_directory_is_that_of_tensorflow_datasets(digits_dir):
    code = "from jaxgen import data; print(data.source('digits', split='test', download=False).directory)"
    environment = {**os.environ, "TFDS_DATA_DIR": str(digits_dir)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(digits_dir / "digits" / "1.0.0")
    assert done.stderr == ""  # nothing is said where nothing is wrong


def test_unknown_names_are_refused_with_what_exists(digits_dir):
    with pytest.raises(ValueError, match=r"`name` must be .* got 'mnits'; did you mean .*'mnist'"):
        data.load("mnits", split="train", data_dir=digits_dir)
    with pytest.raises(ValueError, match=r"`split` must be one of \['test', 'train'\].*got 'valid'"):
        data.load("digits", split="valid", data_dir=digits_dir)
    with pytest.raises(ValueError, match=r"`split` 'train\[:0\]' .* has no examples"):
        data.load("digits", split="train[:0]", data_dir=digits_dir)
    with pytest.raises(RuntimeError, match=r"'digits:7.0.0' cannot be opened"):
        data.load("digits:7.0.0", split="train", data_dir=digits_dir)


def test_absent_data_set_without_download(tmp_path):
    with pytest.raises(FileNotFoundError, match=rf"'digits' is not in {tmp_path}.*`download` is False"):
        data.load("digits", split="train", data_dir=tmp_path, download=False)


def test_no_network_is_said_at_once(tmp_path, monkeypatch):
    def nowhere(*_):
        raise OSError("no such host")

    for name in list(os.environ):
        if name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    monkeypatch.setattr("socket.getaddrinfo", nowhere)
    with pytest.raises(ConnectionError, match=r"'mnist' is not in .*no network \(cannot find .*\)"):
        data.load("mnist", split="train", data_dir=tmp_path)


def flip(path, offset):
    content = bytearray(path.read_bytes())
    content[offset] ^= 0x55
    path.write_bytes(content)


def truncate(path, length):
    path.write_bytes(path.read_bytes()[:length])


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: flip(path, 20_000),
        lambda path: flip(path, 70_000),
        lambda path: truncate(path, 0),
        lambda path: truncate(path, 100_000),
        lambda path: path.unlink(),
    ],
    ids=["flip in an early record", "flip in a late record", "empty", "cut in half", "gone"],
)
def test_damaged_records_are_errors_that_say_how_to_repair(digits_dir, tmp_path, damage):
    shutil.copytree(digits_dir / "digits", tmp_path / "digits")
    (path,) = (tmp_path / "digits" / "1.0.0").glob("digits-test*")
    damage(path)
    with pytest.raises(RuntimeError, match=rf"'digits' in {tmp_path}/digits/1.0.0 is damaged .*Delete that"):
        data.load("digits", split="test", data_dir=tmp_path)
    shutil.rmtree(tmp_path / "digits")  # as the message says
    assert len(data.load("digits", split="test", data_dir=tmp_path)["label"]) == 359


def test_damaged_descriptions_are_errors(digits_dir, tmp_path):
    shutil.copytree(digits_dir / "digits", tmp_path / "digits")
    description = tmp_path / "digits" / "1.0.0" / "dataset_info.json"
    truncate(description, 50)
    with pytest.raises(RuntimeError, match=rf"'digits' cannot be opened .*{tmp_path}/digits is damaged"):
        data.load("digits", split="test", data_dir=tmp_path)
    description.unlink()
    with pytest.raises(RuntimeError, match=r"'digits' in .* is damaged \(dataset_info.json is missing\)"):
        data.load("digits", split="test", data_dir=tmp_path)


def test_labels_out_of_range_are_errors(digits_dir, monkeypatch):
    records = data.source("digits", split="test", data_dir=digits_dir)
    monkeypatch.setitem(records.classes, "label", 5)
    with pytest.raises(RuntimeError, match=r"'digits' in .* label \d is not in 0..4"):
        records.__getitems__(range(20))


def test_data_set_in_a_format_for_tensorflow(digits_dir, tmp_path):
    shutil.copytree(digits_dir / "digits", tmp_path / "digits")
    version = tmp_path / "digits" / "1.0.0"
    description = version / "dataset_info.json"
    description.write_text(description.read_text().replace("array_record", "tfrecord"))
    for path in version.glob("*array_record*"):
        path.rename(version / path.name.replace("array_record", "tfrecord"))
    with pytest.raises(ValueError, match=rf"'digits' in {tmp_path}.* only TensorFlow reads.*`data_dir`"):
        data.load("digits", split="test", data_dir=tmp_path)


LOAD = """
import sys
from jaxgen import data
print(data.load("digits", split="train", data_dir=sys.argv[1])["image"].sum())
"""


def test_processes_that_prepare_at_once_all_read_the_whole(digits_dir, tmp_path):
    command = [sys.executable, "-c", LOAD, str(tmp_path)]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(3)]
    expected = str(data.load("digits", split="train", data_dir=digits_dir)["image"].sum())
    for process in running:
        out, err = process.communicate(timeout=120)
        assert (process.returncode, out.strip()) == (0, expected), err
    assert [path.name for path in (tmp_path / "digits").iterdir()] == ["1.0.0"]


def test_loser_of_the_race_reads_what_the_winner_wrote(digits_dir, tmp_path, monkeypatch):
    from jaxgen.data.digits import Digits

    generate = Digits._split_generators

    def overtaken(self, dl_manager):
        shutil.copytree(digits_dir / "digits", tmp_path / "digits", dirs_exist_ok=True)
        return generate(self, dl_manager)

    monkeypatch.setattr(Digits, "_split_generators", overtaken)
    assert len(data.load("digits", split="test", data_dir=tmp_path)["label"]) == 359


KILLED = """
import os, signal, sys
from jaxgen import data
from jaxgen.data import digits
encode, calls = digits.png, []
def png(image):
    calls.append(1)
    if len(calls) == 1700:  # the training split is written, the test split half
        os.kill(os.getpid(), signal.SIGKILL)
    return encode(image)
digits.png = png
data.load("digits", split="train", data_dir=sys.argv[1])
"""


def test_killed_preparation_leaves_nothing_that_is_read(digits_dir, tmp_path):
    killed = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], stderr=subprocess.DEVNULL, check=False)
    assert killed.returncode == -9
    assert any(path.name.startswith("incomplete") for path in (tmp_path / "digits").iterdir())
    with pytest.raises(FileNotFoundError):
        data.load("digits", split="train", data_dir=tmp_path, download=False)
    for split in ("train", "test"):
        again, whole = (data.load("digits", split=split, data_dir=place) for place in (tmp_path, digits_dir))
        np.testing.assert_array_equal(again["image"], whole["image"])


def test_failed_preparation_names_the_cause(tmp_path, monkeypatch):
    from jaxgen.data.digits import Digits

    def fails(self, dl_manager):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Digits, "_split_generators", fails)
    with pytest.raises(RuntimeError, match=r"'digits' could not be .*prepared in .*No space left on device"):
        data.load("digits", split="test", data_dir=tmp_path)
    assert not (tmp_path / "digits" / "1.0.0").exists()
