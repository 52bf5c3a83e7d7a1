"""A run's directory in a bucket, which can neither append nor be listed before it holds anything.

Checkpoints are not among it: their arrays reach a bucket by Orbax's own way, which knows no other than real ones.
"""

import io
import json

import fsspec
import jax
import numpy as np
import pytest
from etils import epath
from etils.epath import backend, gpath
from PIL import Image

from experiments import digits_diffusion
from jaxgen import checkpoint, images, log, profile, run


class Bucket(fsspec.AbstractFileSystem):
    """Objects by name and nothing else, as Google's: no directories, no appending, nothing there until it is whole."""

    protocol = ("gs", "gcs")
    cachable = False

    def __init__(self):
        super().__init__()
        self.objects = {}

    def ls(self, path, detail=True, **kwargs):
        path = self._strip_protocol(path)
        found = {}
        for name, content in self.objects.items():
            if name == path:
                found[name] = {"name": name, "size": len(content), "type": "file"}
            elif name.startswith(path + "/"):
                rest = name[len(path) + 1 :]
                child = f"{path}/{rest.split('/')[0]}"
                kind = "directory" if "/" in rest else "file"
                found[child] = {"name": child, "size": 0 if "/" in rest else len(content), "type": kind}
        if not found:
            raise FileNotFoundError(path)
        return list(found.values()) if detail else list(found)

    def info(self, path, **kwargs):
        path = self._strip_protocol(path)
        if path in self.objects:
            return {"name": path, "size": len(self.objects[path]), "type": "file"}
        if any(name.startswith(path + "/") for name in self.objects):
            return {"name": path, "size": 0, "type": "directory"}
        raise FileNotFoundError(path)

    def mkdir(self, path, create_parents=True, **kwargs):
        """Does nothing, as there is nothing to do."""

    def makedirs(self, path, exist_ok=False):
        """Does nothing, as there is nothing to do."""

    def _open(self, path, mode="rb", **kwargs):
        if mode == "rb":
            if path not in self.objects:
                raise FileNotFoundError(path)
            return io.BytesIO(self.objects[path])
        assert mode == "wb", f"a bucket's object cannot be opened with {mode!r}"
        return Upload(self, path)

    def cp_file(self, path1, path2, **kwargs):
        self.objects[self._strip_protocol(path2)] = self.objects[self._strip_protocol(path1)]

    def _rm(self, path):
        if self.objects.pop(self._strip_protocol(path), None) is None:
            raise FileNotFoundError(path)


class Upload(io.BytesIO):
    """What is written becomes an object when it is closed; there is no way back in it."""

    def __init__(self, bucket, path):
        super().__init__()
        self._bucket, self._path = bucket, path

    def seekable(self):
        return False

    def seek(self, *args):
        raise OSError("Seek only available in read mode")

    def close(self):
        if not self.closed:
            self._bucket.objects[self._path] = self.getvalue()
        super().close()


@pytest.fixture
def bucket(monkeypatch):
    """Stands in for all of gs://, behind etils' own backend."""
    made = Bucket()
    ours = backend._FileSystemSpecBackend()
    monkeypatch.setattr(ours, "_get_filesystem", lambda name: made)
    monkeypatch.setitem(gpath._PREFIX_TO_BACKEND, "gs", ours)
    monkeypatch.setattr(gpath, "_is_tf_installed", lambda: False)
    return made


WORKDIR = "gs://bucket/some/run"


def test_the_stand_in_does_what_a_bucket_does(bucket):
    path = epath.Path(WORKDIR)
    path.mkdir(parents=True)
    assert not path.exists()
    with pytest.raises(FileNotFoundError):
        list(path.iterdir())
    (path / "a" / "b.txt").write_text("hello")
    assert bucket.objects == {"bucket/some/run/a/b.txt": b"hello"}
    assert [entry.name for entry in path.iterdir()] == ["a"]
    with pytest.raises(AssertionError, match="cannot be opened"), (path / "a" / "b.txt").open("ab"):
        pass


def test_a_bucket_is_claimed_by_one_run(bucket):
    run.claim(WORKDIR, "digits", {"steps": 10})
    run.claim(WORKDIR, "digits", {"steps": 10})
    assert run.read_config(WORKDIR)["config"] == {"steps": 10}
    assert list(bucket.objects) == ["bucket/some/run/config.json"]
    with pytest.raises(ValueError, match=r"gs://bucket/some/run is a run of 'digits' with other settings: steps is 10"):
        run.claim(WORKDIR, "digits", {"steps": 20})
    epath.Path("gs://bucket/other/file").write_text("")
    with pytest.raises(ValueError, match=r"holds \['file'\] and no config.json"):
        run.claim("gs://bucket/other", "digits", {})


def test_without_what_knows_buckets_one_line_says_what_to_install(monkeypatch):
    def missing(name):
        raise ImportError("Please install gcsfs to access Google Storage")

    ours = backend._FileSystemSpecBackend()
    monkeypatch.setattr(ours, "_get_filesystem", missing)
    monkeypatch.setitem(gpath._PREFIX_TO_BACKEND, "gs", ours)
    with pytest.raises(ValueError, match="`directory` gs://bucket/some/run cannot be reached: Please install gcsfs"):
        run.claim(WORKDIR, "digits", {})


def test_pictures_and_arrays(bucket):
    frames = [f"{WORKDIR}/film/{i}.png" for i in range(2)]
    for frame in frames:
        images.save_grid(frame, np.zeros((4, 8, 8, 1)), columns=2, smallest=8)
    images.save_film(f"{WORKDIR}/film.png", frames)
    images.save_arrays(f"{WORKDIR}/drawn.npz", image=np.arange(6.0))
    epath.Path(f"{WORKDIR}/metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.0}\n')
    images.save_curves(f"{WORKDIR}/curves.png", f"{WORKDIR}/metrics.jsonl", ("loss",))
    for name in ("film/0.png", "film.png", "curves.png"):
        Image.open(io.BytesIO(bucket.objects[f"bucket/some/run/{name}"])).verify()
    with np.load(io.BytesIO(bucket.objects["bucket/some/run/drawn.npz"])) as stored:
        np.testing.assert_array_equal(stored["image"], np.arange(6.0))
    assert not [name for name in bucket.objects if "/." in name]


def lines(bucket):
    return [json.loads(line)["step"] for line in bucket.objects["bucket/some/run/metrics.jsonl"].splitlines()]


def test_a_log_is_written_now_and_then_and_when_asked(bucket, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(log.time, "perf_counter", lambda: now[0])
    records = log.Log(f"{WORKDIR}/metrics.jsonl", out=io.StringIO())
    records.begin(0, 100, batch=1)
    for step in (1, 2, 3):
        records.record(step, {})
    assert lines(bucket) == [1]
    now[0] += log.BUCKET_EVERY
    records.record(4, {})
    assert lines(bucket) == [1, 2, 3, 4]
    records.record(5, {})
    records.flush()
    records.record(6, {})
    assert lines(bucket) == [1, 2, 3, 4, 5]
    del bucket.objects["bucket/some/run/metrics.jsonl"]
    again = log.Log(f"{WORKDIR}/metrics.jsonl", out=io.StringIO())
    again.flush()
    assert not bucket.objects  # nothing to write


def test_a_log_goes_on_where_the_checkpoint_stands(bucket):
    path = epath.Path(f"{WORKDIR}/metrics.jsonl")
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"st')
    records = log.Log(path, out=io.StringIO())
    records.begin(2, 100, batch=1)
    assert lines(bucket) == [1, 2]
    records.record(3, {})
    assert lines(bucket) == [1, 2, 3]
    records.record(4, {})  # held
    records.begin(1, 100, batch=1)
    records.flush()
    assert lines(bucket) == [1]
    for step in (2, 3):
        records.record(step, {})
    records.flush()
    assert lines(bucket) == [1, 2, 3]
    log.Log(path, out=io.StringIO()).record(4, {})  # one that has not begun adds as well
    assert lines(bucket) == [1, 2, 3, 4]


def test_a_recording(bucket):
    with profile.Profile(range(1), f"{WORKDIR}/profile") as recorder:
        recorder.before(0, ())
        jax.block_until_ready(jax.numpy.ones(3) + 1)
    assert all(name.startswith("bucket/some/run/profile/plugins/profile/") for name in bucket.objects)
    assert [name for name in bucket.objects if name.endswith(".xplane.pb")]


@pytest.mark.slow
def test_an_experiment(bucket, tmp_path, monkeypatch, capsys):
    """Trains, draws, judges and samples; its checkpoints alone are elsewhere."""
    opened = checkpoint.Checkpoints

    def local(directory, **options):
        assert str(directory) == f"{WORKDIR}/checkpoints"
        return opened(tmp_path, **options)

    monkeypatch.setattr(checkpoint, "Checkpoints", local)
    monkeypatch.setattr("sys.argv", ["digits_diffusion", "--smoke", "--workdir", WORKDIR, "--profile", "2:4"])
    digits_diffusion.main()
    monkeypatch.setattr("sys.argv", ["digits_diffusion", "sample", "--workdir", WORKDIR, "--count", "4"])
    digits_diffusion.main()
    names = {name.removeprefix("bucket/some/run/") for name in bucket.objects}
    wanted = {"config.json", "metrics.jsonl", "samples.png", "film.png", "curves.png", "quality.json", "drawn.png"}
    assert not wanted - names
    assert not [name for name in names if "/." in name or name.startswith(".")]
    assert not (tmp_path / "gs:").exists()
