"""Signatures, letter by letter."""

import pytest

import jaxgen
from jaxgen.metrics import signature

ALL = {
    "features": "inception-2015-12-05",
    "resize": "pillow-bicubic-299",
    "samples": 50_000,
    "references": 50_000,
    "split": "train",
}
VERSION = f"jaxgen:{jaxgen.__version__}"


def test_letter_by_letter():
    fields = "features:inception-2015-12-05|resize:pillow-bicubic-299|n:50000"
    assert signature("frechet", **ALL) == f"frechet|{fields}+50000|reference:train|{VERSION}"
    alone = {name: ALL[name] for name in ("features", "resize", "samples")}
    assert signature("inception", **alone, splits=10) == f"inception|{fields}|splits:10|{VERSION}"
    named = signature("kernel", **ALL, subsets=100, size=1000)
    assert named == f"kernel|{fields}+50000|reference:train|subsets:100|size:1000|{VERSION}"


@pytest.mark.parametrize("changed", [{"features": "judge"}, {"resize": "none"}, {"samples": 9}, {"references": 9}, {"split": "test"}, {"neighbours": 3}])  # fmt: skip
def test_every_field_shows(changed):
    assert signature("frechet", **ALL) != signature("frechet", **{**ALL, **changed})


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"features": "a|b"}, "`features` must be a text without .*, got 'a|b'"),
        ({"resize": ""}, "`resize` must be a text without .*, got ''"),
        ({"split": "train set"}, "`split` must be a text without .*, got 'train set'"),
        ({"crop": "a:b"}, "`crop` must be a text without .*, got 'a:b'"),
        ({"samples": 0}, "`samples` must be an integer of at least 1, got 0"),
        ({"references": 2.5}, "`references` must be an integer of at least 1, got 2.5"),
        ({"split": None}, "`references` and `split` belong together, got 50000 and None"),
        ({"references": None}, "`references` and `split` belong together, got None and 'train'"),
    ],
)
def test_what_could_not_be_read_back_is_refused(changed, message):
    with pytest.raises(ValueError, match=message):
        signature("frechet", **{**ALL, **changed})


def test_the_score_too():
    with pytest.raises(ValueError, match=r"`score` must be a text without .*, got 'a b'"):
        signature("a b", **ALL)
