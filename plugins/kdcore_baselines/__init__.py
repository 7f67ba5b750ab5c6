"""Baselines: the methods that other methods are compared with."""

from typing import TYPE_CHECKING

from kdcore.components.exports import on_access

__all__ = [
    "SEKD",
    "TAID",
    "AdaKD",
    "ByPosition",
    "MiniLLM",
    "Random",
    "SEKDQueue",
    "Shared",
    "Whole",
    "adaspec",
    "akl",
    "alpha_beta",
    "confidence",
    "discount",
    "entropy",
    "everything",
    "forward_kl",
    "hellinger",
    "inverted",
    "jsd",
    "reverse_kl",
    "skew_kl",
    "skew_reverse_kl",
    "student_entropy",
    "total_variation",
    "uniform",
]

if TYPE_CHECKING:
    from kdcore_baselines.method.advantages import MiniLLM
    from kdcore_baselines.method.divergences import (
        TAID,
        akl,
        alpha_beta,
        forward_kl,
        jsd,
        reverse_kl,
        skew_kl,
        skew_reverse_kl,
        total_variation,
    )
    from kdcore_baselines.method.gates import (
        Random,
        adaspec,
        confidence,
        discount,
        entropy,
        everything,
        hellinger,
        inverted,
        student_entropy,
        uniform,
    )
    from kdcore_baselines.method.momentum import Shared
    from kdcore_baselines.method.splitters import ByPosition, Whole
    from kdcore_baselines.method.token_selection.adakd import AdaKD
    from kdcore_baselines.method.token_selection.se_kd import SEKD, SEKDQueue
else:
    # the same names as in the imports for type checkers above; a test compares the two
    _MODULES = {
        ".method.advantages": "MiniLLM",
        ".method.divergences": "TAID akl alpha_beta forward_kl jsd reverse_kl skew_kl "
        "skew_reverse_kl total_variation",
        ".method.gates": "Random adaspec confidence discount entropy everything hellinger "
        "inverted student_entropy uniform",
        ".method.momentum": "Shared",
        ".method.splitters": "ByPosition Whole",
        ".method.token_selection.adakd": "AdaKD",
        ".method.token_selection.se_kd": "SEKD SEKDQueue",
    }
    __getattr__, __dir__ = on_access(__name__, _MODULES)
