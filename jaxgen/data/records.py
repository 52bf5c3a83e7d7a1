"""Data sets by name: their records by index, or all of them as arrays.

Everything goes through tensorflow-datasets' ``data_source`` on array_record files, which give any record by
its index and check every chunk of a file against the hash stored with it: damaged files are errors, never
wrong images.
"""

import contextlib
import difflib
import logging
import os
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from jaxgen.data.prepare import prepare

_CHUNK = 4096  # records decoded at a time: what a load needs beside its result


class Source(Sequence[dict[str, Any]]):
    """The records of one split by index, in the order of the files; what ``source`` returns.

    A record is a dict of NumPy values: images uint8 [height, width, channels], class labels int32 and in
    range; texts are left out. ``features`` has the (shape, dtype) of each, with None for lengths that differ
    between records, ``classes`` the number of classes of each label.
    """

    def __init__(self, name: str, split: str, builder: Any, records: Any) -> None:
        self.name = name
        self.split = split
        self.directory = os.fspath(builder.data_dir)
        self.features, self.classes = _described(builder)
        self._records = records

    def __repr__(self) -> str:
        return f"Source({self.name!r}, {self.split!r}, {len(self)} records in {self.directory})"

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: Any) -> Any:
        """The record at ``index``."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"`index` must lie within {len(self)} records, got {index}")
        return self.__getitems__([int(index) % len(self)])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        """The records at ``indices``, read together; tfds, grain and PyTorch call it by this name."""
        with _named_errors(self.name, self.directory):
            records = self._records.__getitems__([int(index) for index in indices])
            return [self._checked(index, record) for index, record in zip(indices, records, strict=True)]

    def _checked(self, index: int, record: dict[str, Any]) -> dict[str, Any]:
        for key, classes in self.classes.items():
            if not 0 <= record[key] < classes:
                raise ValueError(f"record {index} of {self.split!r}: {key} {record[key]} is not in 0..{classes - 1}")
        return {key: np.asarray(record[key], dtype) for key, (_, dtype) in self.features.items()}


def source(name: str, *, split: str, data_dir: str | os.PathLike[str] | None = None, download: bool = True) -> Source:
    """Opens a split of a data set, preparing the data set first where that has not been done.

    Args:
        name: ``"digits"``, or a name in the registry of tensorflow-datasets such as ``"mnist"`` or
            ``"cifar10"``.
        split: ``"train"``, ``"test"`` or what else the data set has; also slices, ``"train[:80%]"``.
        data_dir: where data sets are kept; by default ``$TFDS_DATA_DIR``, else ``~/tensorflow_datasets``.
        download: whether a data set that is not there may be downloaded and prepared.

    Returns:
        Its records by index.

    Raises:
        ValueError: there is no such data set or no such split, the split is empty, or the data set was
            prepared in a file format that only TensorFlow reads.
        FileNotFoundError: the data set is not there and ``download`` is False.
        ConnectionError, RuntimeError: it could not be prepared, or what is there is damaged.
    """
    with _quiet():
        return _open(_builder(name, data_dir), name, split, download)


def _open(make: Callable[[], Any], name: str, split: str, download: bool) -> Source:
    builder = make()
    if not builder.is_prepared():
        if not download:
            raise FileNotFoundError(f"data set {name!r} is not in {builder.data_dir}, and `download` is False")
        prepare(builder)
        builder = make()
        if not builder.is_prepared():
            raise _damaged(name, os.fspath(builder.data_dir), "dataset_info.json is missing")
    splits = builder.info.splits
    try:
        examples = splits[split].num_examples
    except (KeyError, ValueError) as error:
        raise ValueError(
            f"`split` must be one of {sorted(splits)} of {name!r}, or a slice of one, got {split!r}"
        ) from error
    if examples == 0:
        raise ValueError(f"`split` {split!r} of data set {name!r} in {builder.data_dir} has no examples")
    with _named_errors(name, os.fspath(builder.data_dir)):
        opened = Source(name, split, builder, builder.as_data_source(split))
        opened[0]  # so that a damaged or missing file is found here, not at the first step
    return opened


def described(
    name: str, *, data_dir: str | os.PathLike[str] | None = None
) -> tuple[dict[str, tuple[tuple[Any, ...], np.dtype]], dict[str, int]]:
    """What a data set's records hold; it need not be there, and nothing is downloaded.

    Args:
        name: as for ``source``.
        data_dir: as for ``source``.

    Returns:
        As `Source` has them: the (shape, dtype) of each feature, and the number of classes of each label.

    Raises:
        ValueError: there is no such data set.

    >>> described("digits")
    ({'image': ((8, 8, 1), dtype('uint8')), 'label': ((), dtype('int32'))}, {'label': 10})
    """
    with _quiet():
        return _described(_builder(name, data_dir)())


def load(
    name: str, *, split: str, data_dir: str | os.PathLike[str] | None = None, download: bool = True
) -> dict[str, np.ndarray]:
    """Reads a split of a data set into memory; for data sets that fit.

    Args:
        name: as for ``source``.
        split: as for ``source``.
        data_dir: as for ``source``.
        download: as for ``source``.

    Returns:
        For image data sets ``{"image": uint8 [n, height, width, channels], "label": int32 [n]}``; in general
        every feature of the data set but its texts.

    Raises:
        ValueError: as ``source``, or the images differ in size.
        FileNotFoundError, ConnectionError, RuntimeError: as ``source``.
    """
    records = source(name, split=split, data_dir=data_dir, download=download)
    arrays = {}
    for key, (shape, dtype) in records.features.items():
        if None in shape:
            raise ValueError(
                f"{key!r} of data set {name!r} differs in size, {shape}, and cannot be one array: open it by "
                "`source`, bring its records to one size and give them to `stream`"
            )
        arrays[key] = np.empty((len(records), *shape), dtype)
    for start in range(0, len(records), _CHUNK):
        rows = range(start, min(start + _CHUNK, len(records)))
        chunk = records.__getitems__(rows)
        for key, array in arrays.items():
            array[rows.start : rows.stop] = [record[key] for record in chunk]
    return arrays


def _described(builder: Any) -> tuple[dict[str, tuple[tuple[Any, ...], np.dtype]], dict[str, int]]:
    features = {key: feature for key, feature in dict(builder.info.features).items() if _numeric(feature)}
    classes = {key: feature.num_classes for key, feature in features.items() if hasattr(feature, "num_classes")}
    # Class labels are int64 on disk; int32 is what JAX computes with.
    return {
        key: (tuple(feature.shape), np.dtype(np.int32 if key in classes else feature.np_dtype))
        for key, feature in features.items()
    }, classes


def _builder(name: str, data_dir: str | os.PathLike[str] | None) -> Callable[[], Any]:
    """Returns what makes the tensorflow-datasets builder of ``name``, anew at each call."""
    import tensorflow_datasets as tfds

    # Its import registers "digits" beside the data sets that tensorflow-datasets brings.
    from jaxgen.data import digits  # noqa: F401

    root = None if data_dir is None else os.path.expanduser(os.fspath(data_dir))

    def make() -> Any:
        try:
            return tfds.builder(name, data_dir=root, file_format="array_record")
        except tfds.core.DatasetNotFoundError as error:
            known = tfds.list_builders(with_community_datasets=False)
            close = difflib.get_close_matches(str(name), known, n=3)
            hint = f"; did you mean {' or '.join(map(repr, close))}?" if close else ", such as 'digits' or 'mnist'"
            raise ValueError(
                f"`name` must be a data set of tensorflow-datasets or 'digits', got {name!r}{hint}"
            ) from error
        except Exception as error:
            cause = f"{type(error).__name__}: {error}".splitlines()[0]
            place = os.path.join(root or tfds.core.constants.DATA_DIR, str(name))
            if "File format is already set" in cause:
                raise ValueError(
                    f"data set {name!r} in {place} was prepared in a file format that only TensorFlow "
                    "reads. Give another `data_dir`, or delete that directory to have it "
                    "prepared as array_record"
                ) from error
            raise RuntimeError(
                f"data set {name!r} cannot be opened ({cause}). If there is such a version and "
                f"configuration, then {place} is damaged: delete it and load the data set again"
            ) from error

    return make


@contextlib.contextmanager
def _named_errors(name: str, directory: str) -> Iterator[None]:
    """Says of any error while reading which data set it was, where it lies and how to repair it."""
    try:
        yield
    except Exception as error:
        cause = f"{type(error).__name__}: {error}".splitlines()[0]
        raise _damaged(name, directory, cause) from error


def _damaged(name: str, directory: str, cause: str) -> RuntimeError:
    return RuntimeError(
        f"data set {name!r} in {directory} is damaged ({cause}). Delete that directory and load the data set "
        "again: it will be prepared anew"
    )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps back two warnings about what is as it should be.

    One advises to install OpenCV, on the first image that Pillow decodes in a process; the other says of a
    data set that has not been prepared yet that a file is missing.
    """

    def keep(record: logging.LogRecord) -> bool:
        return not re.search("OpenCV is not installed|has no dataset_info.json", record.getMessage())

    logger = logging.getLogger("absl")
    logger.addFilter(keep)
    try:
        yield
    finally:
        logger.removeFilter(keep)


def _numeric(feature: Any) -> bool:
    """Whether the feature is one array of numbers, unlike a text or a dict of features."""
    dtype = feature.np_dtype
    return not isinstance(dtype, dict) and np.dtype(dtype).kind in "biuf"
