"""Tests that compile for TPUs need Google's compiler, and skip where it is not."""

import importlib.util

import pytest


@pytest.fixture(scope="session")
def libtpu():
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip('libtpu, Google\'s compiler for TPUs, is not installed: pip install "jaxgen[tpu-aot]"')
