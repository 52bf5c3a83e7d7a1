"""What the command line asks of a suite."""

import importlib
import inspect

import pytest

from benchmarks import rounds
from benchmarks.__main__ import SUITES, main


@pytest.mark.parametrize(("name", "module"), [(name, module) for name, (module, _) in SUITES.items()])
def test_a_suite_is_one(name, module):
    suite = importlib.import_module(f"benchmarks.{module}")
    assert f"python -m benchmarks {name}" in suite.__doc__
    if hasattr(suite, "records"):
        assert list(inspect.signature(suite.records).parameters) == ["options"]
    else:
        assert suite.cases(False)
    for quick in (False, True):
        cases = suite.cases(quick) if hasattr(suite, "cases") else []
        assert len({case.name for case in cases}) == len(cases)
        for case in cases:
            assert next(iter(case.sides)) == "jaxgen"


def test_a_case_that_is_not_there(tmp_path, capsys):
    assert main(["compile", "--case", "nowhere", "--out", str(tmp_path)]) == 2
    assert "--case must be part of a case's name, got 'nowhere'" in capsys.readouterr().err


def test_a_suite_that_refuses_itself(tmp_path, capsys, monkeypatch):
    def records(options):
        raise rounds.RefusedError("a reason")
        yield

    monkeypatch.setattr(importlib.import_module("benchmarks.compilation"), "records", records)
    assert main(["compile", "--out", str(tmp_path)]) == 1
    assert capsys.readouterr().out == "REFUSED: a reason\n"
