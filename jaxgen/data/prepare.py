"""Preparing a data set: once, whole or not at all, by any number of processes at a time, without TensorFlow.

tensorflow-datasets writes a data set into a directory of a random name and renames it when it is complete. So
what is read under the final name is whole, and of several processes that prepare the same data set the first
to rename wins. A process that was killed leaves an ``incomplete.*`` directory beside it, which nobody reads.

Its download code and its older image builders (mnist, cifar10) call TensorFlow for a handful of things that
Python and Pillow do as well: opening a file, decoding a path, encoding a PNG. ``_without_tensorflow`` stands
in for those while a data set is prepared.
"""

import contextlib
import importlib.util
import os
import socket
import sys
import urllib.parse
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np


def prepare(builder: Any) -> None:
    """Downloads and prepares the data set of a tensorflow-datasets ``builder``, which is spent thereafter.

    Raises:
        ConnectionError: none of the hosts that it must download from can be found.
        RuntimeError: the download or the preparation failed; names the data set, the directory and the cause.
    """
    _check_network(builder)
    # tensorflow-datasets announces itself on stdout, which belongs to the program's own results.
    with contextlib.redirect_stdout(sys.stderr), _without_tensorflow(builder):
        try:
            builder.download_and_prepare()
        except Exception as error:
            if os.path.isfile(os.path.join(builder.data_dir, "dataset_info.json")):
                return  # another process prepared it meanwhile and renamed first
            cause = f"{type(error).__name__}: {error}".splitlines()[0]
            raise RuntimeError(
                f"data set {builder.name!r} could not be downloaded and prepared in {builder.data_dir} "
                f"({cause}). Nothing was left under that name: correct the cause and load it again"
            ) from error


def _check_network(builder: Any) -> None:
    """Raises ConnectionError where a download could only fail: without names tfds would retry for minutes."""
    hosts = {urllib.parse.urlsplit(url).hostname for url in builder.url_infos or {}}
    hosts.discard(None)
    proxies = {"http_proxy", "https_proxy", "all_proxy"}
    if not hosts or any(name.lower() in proxies for name in os.environ):
        return
    for host in hosts:
        with contextlib.suppress(OSError):
            socket.getaddrinfo(host, None)
            return
    raise ConnectionError(
        f"data set {builder.name!r} is not in {builder.data_dir} and cannot be downloaded: no network "
        f"(cannot find {', '.join(sorted(str(host) for host in hosts))}). Prepare it on a machine with a "
        "network and copy the directory, or use 'digits', which needs none"
    )


@contextlib.contextmanager
def _without_tensorflow(builder: Any) -> Iterator[None]:
    """Lets tensorflow-datasets prepare ``builder`` where TensorFlow is not installed."""
    if importlib.util.find_spec("tensorflow") is not None:
        yield
        return
    from tensorflow_datasets.core.download import extractor
    from tensorflow_datasets.core.features import image_feature

    stand_in = _StandIn(
        io=SimpleNamespace(gfile=SimpleNamespace(GFile=open, exists=os.path.exists)),
        compat=SimpleNamespace(as_text=os.fsdecode),
    )
    package = type(builder).__module__.rpartition(".")[0]
    modules = [extractor, *(m for name, m in list(sys.modules.items()) if name.rpartition(".")[0] == package)]
    replaced: list[tuple[Any, str, Any]] = [(module, "tf", stand_in) for module in modules if hasattr(module, "tf")]
    replaced.append((image_feature._ImageEncoder, "_encode_image", _encode_image))
    with contextlib.ExitStack() as undo:
        for place, name, value in replaced:
            undo.callback(setattr, place, name, getattr(place, name))
            setattr(place, name, value)
        yield


class _StandIn(SimpleNamespace):
    """The part of TensorFlow that preparing images takes; anything else is refused by name."""

    def __getattr__(self, name: str) -> Any:
        raise ImportError(f"preparing this data set calls tf.{name}: install tensorflow to prepare it (not to read it)")


def _encode_image(encoder: Any, image: np.ndarray) -> bytes:
    from tensorflow_datasets.core.features import image_feature

    from jaxgen.data.digits import png

    if encoder.encoding_format != "png" or encoder.np_dtype != np.uint8:
        raise ImportError(
            f"encoding {encoder.np_dtype} images as {encoder.encoding_format} calls tf.image: "
            "install tensorflow to prepare this data set (not to read it)"
        )
    image_feature._validate_np_array(image, shape=encoder.shape, dtype=encoder.np_dtype)
    return png(image)
