"""Measure what a plan costs in quality: losses, greedy agreement and recall, next to full depth and to ablations.

``evaluate`` runs every arm (``make_arms``) over sets of prompts (``text_sets``, ``recall_sets``, ``retrieval_sets``)
and returns an ``Evaluation``. ``time_plans`` times the same plans. docs/evaluation.md defines the arms and the
measures.
"""

from __future__ import annotations

from pop_ext.evaluation.arms import DEFAULT_KINDS, KINDS, Arm, make_arms
from pop_ext.evaluation.prompts import PromptSet, Texts, calibration_batches, read_texts, recall_sets, text_sets
from pop_ext.evaluation.results import Evaluation, Mean
from pop_ext.evaluation.retrieval import retrieval_pairs, retrieval_sets, second_turn_pairs, second_turn_sets
from pop_ext.evaluation.retrieval_templates import EVALUATION, TRAINING
from pop_ext.evaluation.run import evaluate
from pop_ext.evaluation.timing import time_plans

__all__ = [
    "DEFAULT_KINDS",
    "EVALUATION",
    "KINDS",
    "TRAINING",
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
    "retrieval_pairs",
    "retrieval_sets",
    "second_turn_pairs",
    "second_turn_sets",
    "text_sets",
    "time_plans",
]
