"""Test the portable backend on tiny models of many architectures, each against rows that are held back by hooks.

`make architectures` tries all that transformers has.
"""

from __future__ import annotations

import architecture_survey
import pytest

PORTABLE = [
    "apertus:ApertusForCausalLM",
    "arcee:ArceeForCausalLM",
    "cohere2:Cohere2ForCausalLM",
    "deepseek_v3:DeepseekV3ForCausalLM",  # latent attention
    "ernie4_5_moe:Ernie4_5_MoeForCausalLM",
    "falcon_h1:FalconH1ForCausalLM",  # attention and a recurrent mixer in each layer
    "gemma3n_text:Gemma3nForCausalLM",  # shared K and V, inputs per layer
    "gemma4_text:Gemma4ForCausalLM",
    "glm4v:Glm4vForConditionalGeneration",
    "gpt-sw3:GPT2LMHeadModel",
    "granitemoehybrid:GraniteMoeHybridForCausalLM",
    "hyperclovax:HyperCLOVAXForCausalLM",
    "lfm2:Lfm2ForCausalLM",
    "mamba2:Mamba2ForCausalLM",
    "minimax:MiniMaxForCausalLM",
    "nanochat:NanoChatForCausalLM",
    "nemotron_h:NemotronHForCausalLM",
    "phi:PhiForCausalLM",
    "qwen3_5:Qwen3_5ForConditionalGeneration",
    "qwen3_next:Qwen3NextForCausalLM",  # gated delta rule
    "stablelm:StableLmForCausalLM",
]

# The plan omits layers that own no K and V. Nobody reads their context rows, so it changes nothing.
SHARED = {"gemma3n_text:Gemma3nForCausalLM", "gemma4_text:Gemma4ForCausalLM"}

# Layers that keep or hand on more than the portable backend can give them.
REFUSED = {
    "deepseek_v32:DeepseekV32ForCausalLM": "update_indexer",
    "paligemma:PaliGemmaForConditionalGeneration": "use_bidirectional_attention: expected a causal model",
    "recurrent_gemma:RecurrentGemmaForCausalLM": "a forward that returns no cache",
    "zamba:ZambaForCausalLM": "a prefill of 7 tokens",  # a mixer that reads the attention's output
}


@pytest.mark.parametrize("architecture", PORTABLE)
def test_an_architecture_runs_portably_and_equals_held_back_rows(architecture):
    row = architecture_survey.survey(architecture)
    if row.outcome == "stock fails" and "no attribute" in row.reason:
        pytest.skip(f"architecture that this transformers lacks: {architecture}")
    assert (row.outcome, row.errors) == ("portable", {}), str(row)
    assert row.difference < 2e-5
    assert row.full_difference < 2e-5
    assert row.same_tokens
    if architecture in SHARED:
        assert row.effect == 0
    else:
        assert row.effect > 1e-3, "the plan changes nothing"


@pytest.mark.parametrize("architecture", REFUSED)
def test_an_architecture_that_cannot_be_right_is_refused_by_name(architecture):
    row = architecture_survey.survey(architecture)
    assert row.outcome == "refused", str(row)
    assert REFUSED[architecture] in row.reason
