"""``python -m pop_ext.lm_eval run --model pop ...``: the command line of lm-evaluation-harness, which knows ``pop``."""

from __future__ import annotations

from lm_eval.__main__ import cli_evaluate

if __name__ == "__main__":
    cli_evaluate()
