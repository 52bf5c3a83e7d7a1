"""The contrastive loss as it is measured: every side computes the same loss and the same gradient."""

import importlib.util
import sys

import numpy as np
import pytest

from benchmarks import contrastive, rounds

(CASE,) = contrastive.cases(quick=True)
PAIRS = 64


@pytest.fixture(scope="module")
def outputs():
    works = {name: CASE.sides[name](PAIRS) for name in ("jaxgen", "jaxgen-blocks")}
    return {name: work.outputs(work.run()) for name, work in works.items()}


def test_loss_and_gradient_are_the_definitions(outputs):
    """In float64, by a loop over anchors, its gradient by differences along a direction."""
    first, second = (view.astype(np.float64) for view in contrastive.embeddings(PAIRS))

    def loss(views):
        z = views / np.linalg.norm(views, axis=1, keepdims=True)
        values = []
        for i in range(2 * PAIRS):
            logits = z @ z[i] / contrastive.TEMPERATURE
            logits[i] = -np.inf
            values.append(np.log(np.exp(logits).sum()) - logits[(i + PAIRS) % (2 * PAIRS)])
        return np.mean(values)

    views = np.concatenate([first, second])
    direction = np.random.default_rng(1).standard_normal(views.shape)
    slope = (loss(views + 1e-5 * direction) - loss(views - 1e-5 * direction)) / 2e-5
    got = outputs["jaxgen"]
    assert got.shape == (1 + views.size,)
    np.testing.assert_allclose(got[0], loss(views), rtol=1e-5)
    np.testing.assert_allclose(got[1:] @ direction.ravel() / len(views), slope, rtol=1e-3)
    assert 0.01 < np.sqrt(np.mean(got[1:] ** 2)) / got[0] < 1  # a wrong gradient would be seen beside the loss


def test_blocks_and_masks_agree_with_the_whole(outputs):
    sides = {**outputs}
    if importlib.util.find_spec("torch") is not None:
        work = contrastive.masks(PAIRS)
        sides["torch-masks"] = work.outputs(work.run())
    assert min(rounds.check_outputs(sides, CASE).values()) == 1.0


def test_lightly_agrees(outputs):
    pytest.importorskip("torch", reason="install the extra [peers] to compare with lightly")
    if importlib.util.find_spec("lightly") is None:
        pytest.skip("pip install --no-deps lightly to compare with it")
    work = contrastive.lightly(PAIRS)
    rounds.check_outputs({**outputs, "lightly": work.outputs(work.run())}, CASE)
    assert "torchvision" not in sys.modules
    assert sys.modules["lightly.loss.ntx_ent_loss"].__file__.endswith("ntx_ent_loss.py")
