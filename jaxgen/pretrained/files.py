"""The files of a directory as diffusers writes it."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from jaxgen.pretrained.tensors import current_name

CONFIG = "config.json"
WEIGHTS = "diffusion_pytorch_model.safetensors"
INDEX = f"{WEIGHTS}.index.json"


def read_json(path: Path) -> dict[str, Any]:
    """The object that a file of JSON holds; ValueError where it holds none."""
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} must be JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must be a JSON object, got {type(content).__name__}")
    return content


def read_tensors(directory: Path) -> dict[str, np.ndarray]:
    """All tensors of a directory by their names of today, float32; refused where one is stored as anything else."""
    tensors: dict[str, np.ndarray] = {}
    for file in _files(directory):
        try:
            with safe_open(directory / file, framework="numpy") as opened:
                for key in opened.keys():  # noqa: SIM118  (it is no dictionary)
                    name = current_name(key)
                    dtype = opened.get_slice(key).get_dtype()
                    if dtype not in ("F32", "F16", "BF16"):
                        raise ValueError(f"the weights must be float32, float16 or bfloat16, got {dtype} for {key}")
                    if name in tensors:
                        raise ValueError(f"the weights must be given once each, got two of {name}")
                    tensors[name] = opened.get_tensor(key).astype(np.float32, copy=False)
        except SafetensorError as error:
            raise ValueError(f"{directory / file} must be a whole safetensors file: {error}") from error
    return tensors


def _files(directory: Path) -> list[str]:
    """The names of the files of weights, none of which leads out of the directory."""
    whole, index = (directory / WEIGHTS).exists(), (directory / INDEX).exists()
    if whole == index:
        came = "both" if whole else ", ".join(sorted(p.name for p in directory.glob("*.bin"))) or "neither"
        hint = "; a pickle is not opened, as it can run code" if came.endswith(".bin") else ""
        error: type[Exception] = ValueError if whole else FileNotFoundError
        raise error(f"{directory} must hold either {WEIGHTS} or {INDEX}, got {came}{hint}")
    if whole:
        return [WEIGHTS]
    shards = read_json(directory / INDEX).get("weight_map")
    if not isinstance(shards, dict):
        raise ValueError(f"{directory / INDEX} must hold an object `weight_map`, got {type(shards).__name__}")
    for file in shards.values():
        if not isinstance(file, str) or not re.fullmatch(r"[\w.-]+\.safetensors", file):
            raise ValueError(f"{directory / INDEX} must name files of its directory, *.safetensors, got {file!r}")
    return sorted(set(shards.values()))
