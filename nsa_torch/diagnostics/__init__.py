"""What a model's layers attend to, and whether they look ahead.

`diagnose` measures the choice of blocks, the gates and the branches of every NSAAttention in a model, on a text of
yours; `check_causality` changes what comes later and reports what changes before it.
"""

from .causality import CausalityReport, Leak, check_causality
from .diagnosis import BRANCHES, Diagnosis, LayerDiagnosis, diagnose

__all__ = [
    "BRANCHES",
    "CausalityReport",
    "Diagnosis",
    "LayerDiagnosis",
    "Leak",
    "check_causality",
    "diagnose",
]
