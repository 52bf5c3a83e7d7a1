"""The Fréchet distance as it is measured: what is called exact is, and every side says by how much it is off."""

import numpy as np
import pytest
from scipy import linalg

from benchmarks import frechet, rounds

(CASE,) = frechet.cases(quick=True)


def test_exact_is_the_definition():
    first, second, exact = frechet.features(300, 16)
    a, b = (np.cov(one.astype(np.float64), rowvar=False) for one in (first, second))
    root = linalg.sqrtm(a)
    between = linalg.sqrtm(root @ b @ root)
    distance = np.sum((first.mean(0, np.float64) - second.mean(0, np.float64)) ** 2) + np.trace(a + b - 2 * between)
    np.testing.assert_allclose(exact, distance, rtol=1e-6)
    assert np.abs(a @ b - b @ a).max() > 1e-3  # they do not commute, which would be too easy


def test_sides_agree_and_say_how_exact_they_are():
    works = {name: side(1) for name, side in CASE.sides.items()}
    outputs = {name: np.asarray(work.outputs(work.run())) for name, work in works.items()}
    rounds.check_outputs(outputs, CASE)
    errors = {name: work.quality(outputs[name])["relative_error"] for name, work in works.items()}
    assert errors.keys() == {"jaxgen", "scipy", "eigenvalues"}
    assert max(errors.values()) < 1e-5
    assert works["scipy"].quality(1.01 * outputs["scipy"])["relative_error"] == pytest.approx(0.01, rel=1e-3)


def test_a_larger_batch_is_more_of_the_same():
    work = CASE.sides["jaxgen"](3)
    found = work.outputs(work.run())
    assert found.shape == (3,)
    assert np.ptp(found) == 0
