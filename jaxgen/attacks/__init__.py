"""Adversarial attacks on any callable, and defences against them.

An attack is one pure function, compiled as a whole: ``attack(key, objective, x, threat, ...) -> x_adv``.
"""

from jaxgen.attacks.apgd import apgd
from jaxgen.attacks.auto_attack import (
    Outcome,
    Stage,
    anywhere,
    auto_attack,
    ensemble,
    next_likeliest,
    randomised,
    standard,
)
from jaxgen.attacks.carlini_wagner import carlini_wagner
from jaxgen.attacks.deepfool import deepfool
from jaxgen.attacks.diagnose import Diagnosis, Flags, diagnose, report
from jaxgen.attacks.expectation import Expected, expected
from jaxgen.attacks.fab import fab
from jaxgen.attacks.fgsm import fgsm
from jaxgen.attacks.objectives import Classified, cross_entropy, dlr, label_free, margin
from jaxgen.attacks.pgd import mifgsm, pgd
from jaxgen.attacks.purification import purify
from jaxgen.attacks.restarts import restarts
from jaxgen.attacks.robust_curve import RobustCurve, robust_curve
from jaxgen.attacks.smoothing import Smoothed, denoised, smooth, smooth_certify, smooth_predict, smooth_votes
from jaxgen.attacks.square import square
from jaxgen.attacks.threat import ThreatModel, distance, project, random_start
from jaxgen.attacks.training import BatchAttack, adversarial, grad_align, kl_divergence, trades

__all__ = [
    "BatchAttack",
    "Classified",
    "Diagnosis",
    "Expected",
    "Flags",
    "Outcome",
    "RobustCurve",
    "Smoothed",
    "Stage",
    "ThreatModel",
    "adversarial",
    "anywhere",
    "apgd",
    "auto_attack",
    "carlini_wagner",
    "cross_entropy",
    "deepfool",
    "denoised",
    "diagnose",
    "distance",
    "dlr",
    "ensemble",
    "expected",
    "fab",
    "fgsm",
    "grad_align",
    "kl_divergence",
    "label_free",
    "margin",
    "mifgsm",
    "next_likeliest",
    "pgd",
    "project",
    "purify",
    "random_start",
    "randomised",
    "report",
    "restarts",
    "robust_curve",
    "smooth",
    "smooth_certify",
    "smooth_predict",
    "smooth_votes",
    "square",
    "standard",
    "trades",
]
