"""What a plan costs in quality: losses, greedy continuations and recall, beside full depth and beside ablations."""

from __future__ import annotations

from pop_ext.evaluation.arms import DEFAULT_KINDS, KINDS, Arm, make_arms
from pop_ext.evaluation.prompts import PromptSet, Texts, calibration_batches, read_texts, recall_sets, text_sets
from pop_ext.evaluation.results import Evaluation, Mean
from pop_ext.evaluation.run import evaluate
from pop_ext.evaluation.timing import time_plans

__all__ = [
    "DEFAULT_KINDS",
    "KINDS",
    "Arm",
    "Evaluation",
    "Mean",
    "PromptSet",
    "Texts",
    "calibration_batches",
    "evaluate",
    "make_arms",
    "read_texts",
    "recall_sets",
    "text_sets",
    "time_plans",
]
