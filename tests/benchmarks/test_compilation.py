"""Starts: processes that say where their time went, and refusals of starts that are not what they are called."""

import sys
from argparse import Namespace

import numpy as np
import pytest

from benchmarks import compilation, rounds

STARTED = """
import json, sys, time
import numpy as np
np.save(sys.argv[-1], np.ones(3))
now = time.time()
print("a word of a library")
print(json.dumps({"ends": {"python": now, "import": now + 1, "first": now + 3}, "cached": CACHED, "device": "d", "devices": 1}))
"""


@pytest.fixture
def started(monkeypatch, tmp_path):
    """Starts a side whose process does what is written here."""

    def start(name, cached=False, text=STARTED):
        file = tmp_path / "child.py"
        file.write_text(text.replace("CACHED", str(cached)))
        monkeypatch.setattr(compilation, "COMMAND", [sys.executable, str(file)])
        return compilation.started(name, ("unet", 2), 1, tmp_path)

    return start


def test_a_start_is_timed_from_outside(started):
    told, image = started("jaxgen-cold")
    assert list(told["phases"]) == ["python", "import", "first"]
    assert told["phases"]["import"] == pytest.approx(1, abs=1e-3)
    assert told["phases"]["first"] == pytest.approx(2, abs=1e-3)
    assert 0 < told["phases"]["python"] < 10
    assert told["seconds"] == pytest.approx(sum(told["phases"].values()))
    np.testing.assert_array_equal(image, np.ones(3))


@pytest.mark.parametrize(
    ("name", "options", "reason"),
    [
        ("jaxgen-cold", {"cached": True}, "jaxgen-cold: its program came from a cache"),
        ("diffusers", {"text": "raise SystemExit(3)"}, "diffusers ended with 3"),
    ],
)
def test_refused(started, name, options, reason):
    with pytest.raises(rounds.RefusedError, match=reason):
        started(name, **options)


def test_only_the_warm_sides_have_a_cache(started, monkeypatch):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "the user's own")
    text = 'import os\nSEEN = os.environ.get("JAX_COMPILATION_CACHE_DIR", "none")\n' + STARTED.replace('"d"', "SEEN")
    assert started("jaxgen-cold", text=text)[0]["device"] == "none"
    for name in compilation.WARM:
        assert started(name, cached=True, text=text)[0]["device"].endswith("/cache")


def test_the_warm_side_must_come_from_the_cache(monkeypatch):
    told = {"cached": False, "seconds": 1.0, "phases": {"first": 1.0}, "device": "d", "devices": 1}
    monkeypatch.setattr(compilation, "started", lambda *_: (dict(told), np.ones(3)))
    monkeypatch.setattr(compilation, "write_files", lambda *_: None)
    options = Namespace(quick=True, case="", against=[], threads=1, repeats=2, budget=1.0)
    with pytest.raises(rounds.RefusedError, match="its program did not come from the cache"):
        list(compilation.records(options))
    told["cached"] = True
    (record,) = compilation.records(options)
    assert record.seconds == (1.0, 1.0)
    assert record.phases == {"first": 1.0}


@pytest.mark.slow
def test_starts():
    """Two minutes: three sides, twice each and once to begin with."""
    options = Namespace(quick=True, case="", against=["jaxgen"], threads=1, repeats=2, budget=1e9)
    live, exported, cold = compilation.records(options)
    assert [record.side for record in (live, exported, cold)] == ["jaxgen", "jaxgen-exported", "jaxgen-cold"]
    assert list(cold.phases) == ["python", "import", "load", "trace", "lower", "compile", "first"]
    assert list(exported.phases) == ["python", "import", "load", "first"]
    assert live.phases["compile"] < 0.5 * cold.phases["compile"]
    assert cold.ratio > 1
    assert (cold.alike, exported.alike) == (1.0, 1.0)
