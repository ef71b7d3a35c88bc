"""The command line of lm-evaluation-harness with the model ``pop`` registered.

Example: ``python -m pop_ext.lm_eval run --model pop --model_args pretrained=NAME,count=10 --tasks hellaswag``.
"""

from __future__ import annotations

from lm_eval.__main__ import cli_evaluate

if __name__ == "__main__":
    cli_evaluate()
