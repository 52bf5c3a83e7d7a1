"""What sides of networks need to run in the tests' own process."""

from pathlib import Path

import pytest

from benchmarks import networks


@pytest.fixture
def in_this_process(monkeypatch):
    """Weights are written here, and the devices are the tests'."""
    networks.in_diffusers.cache_clear()
    monkeypatch.setattr(networks.subprocess, "run", lambda words, **_: networks.save(words[-2], Path(words[-1])))
    monkeypatch.setattr("benchmarks.case.every_core", lambda: None)
