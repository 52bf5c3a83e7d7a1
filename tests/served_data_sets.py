"""Fixtures: mnist, cifar10 and imagenet2012 in their original formats with fewer images, from this machine.

tensorflow-datasets' own builders fetch and prepare them: everything after the address is what users run.
"""

import functools
import gzip
import http.server
import io
import struct
import sys
import tarfile
import threading

import numpy as np
import pytest
from PIL import Image

TRAIN, TEST = 40, 20


@pytest.fixture
def images(request):
    rng = np.random.default_rng(0)
    return {
        split: (rng.integers(0, 256, (n, *request.param), np.uint8), rng.integers(0, 10, n, np.uint8))
        for split, n in (("train", TRAIN), ("test", TEST))
    }


@pytest.fixture
def served(tmp_path):
    """A directory and the address under which its files are."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    directory = tmp_path / "served"
    directory.mkdir()
    handler = functools.partial(Quiet, directory=directory)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield directory, f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()
        thread.join()


@pytest.fixture
def mnist(images, served, monkeypatch):
    import tensorflow_datasets as tfds

    directory, address = served
    for split, prefix in (("train", "train"), ("test", "t10k")):
        pixels, labels = images[split]
        header = struct.pack(">4i", 2051, len(pixels), 28, 28)
        (directory / f"{prefix}-images-idx3-ubyte.gz").write_bytes(gzip.compress(header + pixels.tobytes()))
        header = struct.pack(">2i", 2049, len(labels))
        (directory / f"{prefix}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(header + labels.tobytes()))
    builder = tfds.builder_cls("mnist")
    monkeypatch.setattr(builder, "URL", address)
    monkeypatch.setattr(builder, "url_infos", {})
    module = sys.modules[builder.__module__]
    monkeypatch.setattr(module, "_TRAIN_EXAMPLES", TRAIN)
    monkeypatch.setattr(module, "_TEST_EXAMPLES", TEST)
    return images


@pytest.fixture
def cifar10(images, served, monkeypatch):
    import tensorflow_datasets as tfds

    directory, address = served
    with tarfile.open(directory / "cifar-10-binary.tar.gz", "w:gz") as archive:

        def add(name, content):
            info = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))

        add("batches.meta.txt", "\n".join("abcdefghij").encode())
        for split, count, name in (("train", 5, "data_batch_{}.bin"), ("test", 1, "test_batch.bin")):
            pixels, labels = images[split]
            rows = np.concatenate([labels[:, None], pixels.transpose(0, 3, 1, 2).reshape(len(labels), -1)], axis=1)
            for part, chunk in enumerate(np.split(rows, count), start=1):
                add(name.format(part), chunk.tobytes())
    builder = tfds.builder_cls("cifar10")
    original = builder._cifar_info.fget
    monkeypatch.setattr(builder, "url_infos", {})
    monkeypatch.setattr(
        builder,
        "_cifar_info",
        property(lambda self: original(self)._replace(url=address + "cifar-10-binary.tar.gz")),
    )
    return images


@pytest.fixture
def imagenet2012(tmp_path, monkeypatch):
    """A data directory with ImageNet's archive of archives, of two classes, for its builder to find."""
    import tensorflow_datasets as tfds

    rng = np.random.default_rng(0)
    builder = tfds.builder_cls("imagenet2012")
    monkeypatch.setattr(builder, "url_infos", {})
    names = builder(data_dir=tmp_path / "names").info.features["label"].names
    manual = tmp_path / "data" / "downloads" / "manual"
    manual.mkdir(parents=True)

    def add(archive, name, content):
        info = tarfile.TarInfo(name)
        info.size = len(content)
        archive.addfile(info, io.BytesIO(content))

    with tarfile.open(manual / "ILSVRC2012_img_train.tar", "w") as archive:
        for label in (3, 997):
            inner = io.BytesIO()
            with tarfile.open(fileobj=inner, mode="w") as images:
                for number, size in enumerate([(37, 50), (64, 48), (20, 20), (33, 90)]):
                    file = io.BytesIO()
                    Image.fromarray(rng.integers(0, 256, (*size, 3), np.uint8)).save(file, "jpeg")
                    add(images, f"{names[label]}_{number}.JPEG", file.getvalue())
            add(archive, f"{names[label]}.tar", inner.getvalue())
    with tarfile.open(manual / "ILSVRC2012_img_val.tar", "w") as archive:
        add(archive, "ILSVRC2012_val_00000001.JPEG", file.getvalue())
    return tmp_path / "data"
