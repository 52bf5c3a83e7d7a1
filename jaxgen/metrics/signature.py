"""What a score was measured with, in one line, to be printed beside it."""

from jaxgen import __version__, checks


def signature(
    score: str,
    *,
    features: str,
    resize: str,
    samples: int,
    references: int | None = None,
    split: str | None = None,
    **options: str | float,
) -> str:
    """The signature of a score: two scores compare only where their signatures are the same.

    In the manner of sacrebleu (Post 2018, arXiv:1804.08771): fields of a name and a value, in one order.

    Args:
        score: the score's name, such as "frechet".
        features: what extracted them, to the version of its weights.
        resize: how images were brought to the extractor's size; "none" where they were not.
        samples: how many were scored.
        references: how many they were compared with; None for a score that compares with none.
        split: of which data these were, such as "train".
        **options: the score's own, such as ``neighbours=3``, in this order.

    Returns:
        A line without spaces.

    Raises:
        ValueError: a number is not an integer of at least 1, references or split is given without the other, or a text
            is empty or holds "|", ":" or a space, so that a signature could not be read back.

    >>> signature("frechet", features="judge", resize="none", samples=500, references=1400, split="train")
    'frechet|features:judge|resize:none|n:500+1400|reference:train|jaxgen:0.1.0'
    """
    checks.positive_integer("samples", samples)
    if (references is None) != (split is None):
        raise ValueError(f"`references` and `split` belong together, got {references!r} and {split!r}")
    for name, value in {"score": score, "features": features, "resize": resize, "split": split, **options}.items():
        text = str(value)
        if not text or any(letter in "|:" or letter.isspace() for letter in text):
            raise ValueError(f'`{name}` must be a text without "|", ":" and spaces, got {value!r}')
    compared = ""
    if references is not None:
        checks.positive_integer("references", references)
        compared = f"+{references}|reference:{split}"
    chosen = "".join(f"|{name}:{value}" for name, value in options.items())
    return f"{score}|features:{features}|resize:{resize}|n:{samples}{compared}{chosen}|jaxgen:{__version__}"
