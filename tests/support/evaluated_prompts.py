"""A plan and small sets of prompts for tests of evaluations."""

from __future__ import annotations

from models import tokens
from pop_ext import Plan
from pop_ext.evaluation import PromptSet

PLAN = Plan(6, (1, 4, 5), boundary=2)


def prompt_sets(model, prompts=3):
    pairs = [(tokens(model, 24, seed=i), tokens(model, 6, seed=20 + i)) for i in range(prompts)]
    return [PromptSet("text", 24, tuple(pairs)), PromptSet("recall", 24, tuple(pairs[:2]))]
