"""``--model pop`` of lm-evaluation-harness (extra ``eval``): importing this package registers it.

The harness finds models by registration alone, so something must import this package before it looks:
``python -m pop_ext.lm_eval`` does, and is the harness's own command line otherwise.
"""

from __future__ import annotations

from pop_ext.lm_eval.model import PopLM

__all__ = ["PopLM"]
