"""The file: one of safetensors (https://github.com/huggingface/safetensors), so a table of contents and numbers.

Its tensors are, in this order,

    arrays of whole cache lines of 64 bytes, from a multiple of 64 on          as they lie in memory        (1)
    the other arrays                                                                                        (2)
    ``sha256``, the digest of every byte before it                             uint8 [32]                   (3)

By Eq. 1 a CPU computes with the file's own pages: reading maps them and copies nothing. By Eq. 3 a damaged file is not
taken for a whole one; it is the SHA-256 of the SHA-256s of pieces of 8 MiB, so that all cores take part in reading.
Nothing is pickled.
"""

import hashlib
import json
import mmap
import os
import uuid
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax.numpy as jnp
import numpy as np

_LINE, _PIECE = 64, 2**23
_DIGEST, _LENGTH = "sha256", 32
_CODES = {
    "bool": "BOOL", "uint8": "U8", "int8": "I8", "uint16": "U16", "int16": "I16", "uint32": "U32", "int32": "I32",
    "uint64": "U64", "int64": "I64", "float16": "F16", "bfloat16": "BF16", "float32": "F32", "float64": "F64",
    "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2",
}  # fmt: skip
_DTYPES = {code: jnp.dtype(name) for name, code in _CODES.items()}


def check_dtype(name: str, dtype: Any) -> None:
    """Raises ValueError unless a file can hold numbers of that dtype."""
    if str(dtype) not in _CODES:
        raise ValueError(f"`{name}` must be of a dtype that a file can hold, {', '.join(_CODES)}; got {dtype}")


def write(file: str | os.PathLike[str], arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> None:
    """Writes arrays by name, the whole file or nothing; who has an old one mapped keeps what they have."""
    ordered = sorted(arrays.items(), key=lambda item: (item[1].nbytes % _LINE != 0, -item[1].itemsize))
    contents: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name, array in [*ordered, (_DIGEST, np.empty(_LENGTH, np.uint8))]:
        start, end = end, end + array.nbytes
        contents[name] = {"dtype": _CODES[str(array.dtype)], "shape": array.shape, "data_offsets": (start, end)}
    header = json.dumps(contents).encode()
    header += b" " * (-(8 + len(header)) % _LINE)
    from etils.epath import Path  # not needed to read

    digest, path = _Digest(), Path(file)
    path.parent.mkdir(parents=True, exist_ok=True)
    # A name of its own: two programs that write one file at once do not mix.
    temporary = path.with_name(f".{path.name}-{uuid.uuid4().hex}")
    try:
        with temporary.open("wb") as opened:
            for part in (len(header).to_bytes(8, "little") + header, *(_bytes(array) for _, array in ordered)):
                digest.update(part)
                opened.write(part)
            opened.write(digest.whole())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def read(file: str | os.PathLike[str]) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Maps the arrays of a file, read-only, once its checksum is found right; one in a bucket is copied.

    Returns:
        The arrays and the metadata.

    Raises:
        ValueError: the file is damaged, or of another kind.
        OSError: it cannot be read.
    """
    content = memoryview(_fetched(file) if "://" in os.fspath(file) else _mapped(file))
    if len(content) < 8 + _LENGTH or _digest(content[:-_LENGTH]) != content[-_LENGTH:]:
        raise ValueError(f"{file} must be a whole file of `jaxgen.export.save`: it is damaged, or of another kind")
    data = 8 + int.from_bytes(content[:8], "little")
    contents = json.loads(bytes(content[8:data]))
    metadata = contents.pop("__metadata__")
    arrays = {}
    for name, entry in contents.items():
        start, end = (data + offset for offset in entry["data_offsets"])
        arrays[name] = np.frombuffer(content[start:end], _DTYPES[entry["dtype"]]).reshape(entry["shape"])
    return arrays, metadata


class _Digest:
    """The digest of bytes that come in parts of any length."""

    def __init__(self) -> None:
        self._whole, self._piece, self._room = hashlib.sha256(), hashlib.sha256(), _PIECE

    def update(self, part: bytes | memoryview) -> None:
        for start in range(0, len(part), _PIECE):
            some = part[start : start + _PIECE]
            self._piece.update(some[: self._room])
            if len(some) >= self._room:
                self._whole.update(self._piece.digest())
                self._piece = hashlib.sha256(some[self._room :])
                self._room += _PIECE
            self._room -= len(some)

    def whole(self) -> bytes:
        if self._room < _PIECE:
            self._whole.update(self._piece.digest())
        return self._whole.digest()


def _digest(content: memoryview) -> bytes:
    """The same of bytes that are all there."""
    pieces = [content[start : start + _PIECE] for start in range(0, len(content), _PIECE)]
    with ThreadPoolExecutor(os.cpu_count()) as threads:  # hashing a piece holds no lock
        digests = threads.map(lambda piece: hashlib.sha256(piece).digest(), pieces)
        return hashlib.sha256(b"".join(digests)).digest()


def _fetched(file: str | os.PathLike[str]) -> bytes:
    from etils.epath import Path

    return Path(file).read_bytes()


def _mapped(file: str | os.PathLike[str]) -> mmap.mmap | bytes:
    with open(file, "rb") as opened:
        size = os.fstat(opened.fileno()).st_size  # nothing cannot be mapped
        return mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) if size else b""


def _bytes(array: np.ndarray) -> Any:
    return array.reshape(-1).view(np.uint8).data
