"""The model ``pop`` of lm-evaluation-harness (extra ``eval``). Importing this package registers it.

The harness finds only models that are registered. ``python -m pop_ext.lm_eval`` registers ``pop`` and then runs the
harness's own command line.
"""

from __future__ import annotations

from pop_ext.lm_eval.model import PopLM

__all__ = ["PopLM"]
