"""The reference implementation of scores, where it is installed."""

import importlib
import importlib.util
import sys
import types
from unittest import mock

import pytest


def torch_fidelity(score):
    """Its module of a score, such as "kid"."""
    pytest.importorskip("torch", reason="PyTorch is not installed")
    pytest.importorskip("tqdm", reason="tqdm is not installed")
    found = importlib.util.find_spec("torch_fidelity")
    if found is None:
        pytest.skip("torch-fidelity is not installed")
    # The package imports every extractor, and these torchvision: of functions of features none has need.
    package = types.ModuleType("torch_fidelity")
    package.__path__ = found.submodule_search_locations
    with mock.patch.dict(sys.modules, {"torch_fidelity": package, "torch_fidelity.utils": mock.MagicMock()}):
        return importlib.import_module(f"torch_fidelity.metric_{score}")
