"""Defaults that a function and its command share. Nothing is imported, since the command's help states them."""

from __future__ import annotations

STEPS, LEARNING_RATE = 120, 3e-4
"""Largest number of steps, and largest learning rate, of ``pop_ext.fit(method="distill")``."""
