"""Use pop_ext with Hugging Face: the same generate(), with a faster first token.

python examples/quickstart.py --model meta-llama/Llama-3.2-1B-Instruct --prompt-file prompt.txt
"""

from __future__ import annotations

import argparse
import time

import pop_ext
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder or Hugging Face name")
    parser.add_argument("--prompt-file", required=True)
    parser.add_argument(
        "--boundary", type=int, default=1, help="boundary rows: last tokens of the prompt, which run at full depth"
    )
    options = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype="auto")
    with open(options.prompt_file, encoding="utf-8") as file:
        inputs = tokenizer(file.read(), return_tensors="pt", truncation=True)
    plan = pop_ext.Plan.last(model.config.num_hidden_layers, boundary=options.boundary)

    def first_token() -> float:
        start = time.perf_counter()
        model.generate(**inputs, max_new_tokens=1, do_sample=False)
        return time.perf_counter() - start

    first_token()
    print(f"stock:  first token after {1e3 * first_token():.1f} ms")
    with pop_ext.enabled(model, plan):
        first_token()
        print(f"pruned: first token after {1e3 * first_token():.1f} ms")
        new = model.generate(**inputs, max_new_tokens=32, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        print(pop_ext.last_call(model))
        print(tokenizer.decode(new))


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
