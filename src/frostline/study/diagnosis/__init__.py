"""What limits a run, and what to do next: findings, each with its evidence for and against.

No finding rests on one number. A piece of evidence has a weight, in natural logarithms of odds:
how much more likely what was seen is where the finding is true than where it is not (Good 1950,
"Probability and the Weighing of Evidence"; weights of independent pieces add up). The weights are
ours, graded and bounded, and no more than a way to add unlike things; how often the findings are
right was measured on planted faults (`benchmarks/results/diagnosis.md`). A finding is made where
its evidence outweighs a doubt that stands against all of them, and two pieces speak for it or one
that was measured for the purpose: runs with another setting, a probe, a learning curve. What
curves and settings say against a finding is bounded, as they are all of one run.

Training and validation loss are compared with care: see `frostline.study.run_facts`. Augmentation
and dropout only raise the training loss, so a gap between the two counts as a lower bound, and the
absence of one for little.
"""

from __future__ import annotations

from frostline.study.diagnosis.diagnosing import diagnose, save_diagnosis
from frostline.study.diagnosis.findings import (
    Action,
    Diagnosis,
    Evidence,
    Finding,
    Gain,
    Kind,
    Source,
)

__all__ = [
    "Action",
    "Diagnosis",
    "Evidence",
    "Finding",
    "Gain",
    "Kind",
    "Source",
    "diagnose",
    "save_diagnosis",
]
