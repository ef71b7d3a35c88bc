"""`PopLM` of lm-evaluation-harness on a tiny model and on tasks of local files."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pop_ext
import pytest
import torch
from model_folder import save_tiny_llama
from pop_ext import Plan
from transformers import AutoModelForCausalLM, AutoTokenizer

pytest.importorskip("lm_eval", reason="needs lm-eval")

from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model
from lm_eval.tasks import TaskManager
from pop_ext.lm_eval import PopLM

TASKS = {
    "choice": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{prompt}}",
        "doc_to_target": "{{answer}}",
        "doc_to_choice": "{{choices}}",
        "metric_list": [{"metric": "acc"}],
    },
    "rolling": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{prompt}}",
        "metric_list": [{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
    },
    "continue": {
        "output_type": "generate_until",
        "doc_to_text": "{{prompt}}",
        "doc_to_target": "{{text}}",
        "generation_kwargs": {"until": ["\n\n"], "max_gen_toks": 6},
        "metric_list": [{"metric": "exact_match"}],
    },
}
DOCUMENTS = [
    {"prompt": "def square(x):\n    return", "choices": [" x * x", " None"], "answer": 0, "text": "x"},
    {"prompt": "import os, sys, re\nimport", "choices": [" json", " = 5 +"], "answer": 0, "text": "y"},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = save_tiny_llama(tmp_path_factory.mktemp("model"))
    tokenizer = AutoTokenizer.from_pretrained(path)
    tokenizer.eos_token = "<unk>"
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """Return a folder of task files whose documents lie in a local file."""
    path = tmp_path_factory.mktemp("tasks")
    data = path / "documents.jsonl"
    data.write_text("\n".join(json.dumps(document) for document in DOCUMENTS))
    for name, task in TASKS.items():
        source = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}}, "test_split": "test"}
        (path / f"{name}.yaml").write_text(json.dumps({"task": f"pop_test_{name}", **source, **task}))  # JSON is YAML
    return path


@pytest.fixture
def model(folder):
    return PopLM(str(folder), omit="2+4-5", boundary=3, batch_size=2)


def requests(kind, *arguments):
    return [Instance(kind, {}, args, index) for index, args in enumerate(arguments)]


def test_the_harness_knows_the_model_pop():
    assert get_model("pop") is PopLM


def test_loglikelihood_equals_score_despite_min_tokens(folder, tmp_path):
    Plan(6, (2, 4, 5), boundary=3, min_tokens=1000).save(tmp_path / "plan.json")
    model = PopLM(str(folder), plan=str(tmp_path / "plan.json"), batch_size=2)
    pairs = [("def square(x):\n    return", " x * x"), ("abc", "d"), ("", "import os"), ("x = 1 ", "+ 2")]
    found = model.loglikelihood(requests("loglikelihood", *pairs), disable_tqdm=True)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = [[tokenizer(text, add_special_tokens=False)["input_ids"] for text in pair] for pair in pairs]
    ids[2][0] = [model.prefix_token_id]
    ids[3] = [ids[3][0][:-1], ids[3][0][-1:] + ids[3][1]]  # a trailing space belongs to what follows
    stock = AutoModelForCausalLM.from_pretrained(folder)
    with pop_ext.enabled(stock, Plan(6, (2, 4, 5), boundary=3)):
        expected = pop_ext.score(stock, [context for context, _ in ids], [after for _, after in ids])
    for (likelihood, greedy), score in zip(found, expected, strict=True):
        assert likelihood == pytest.approx(score.log_likelihood, abs=1e-3)
        assert greedy == score.is_greedy


@pytest.mark.cpu
def test_8_bit_products_are_those_of_an_enabled_model(folder):
    model = PopLM(str(folder), count=2, int8=True)
    pair = ("def square(x):\n    return", " x * x")
    [(found, _)] = model.loglikelihood(requests("loglikelihood", pair), disable_tqdm=True)
    stock = AutoModelForCausalLM.from_pretrained(folder)
    context, continuation = (model.tok_encode(text) for text in pair)
    expected = {}
    for int8 in (False, True):
        with pop_ext.enabled(stock, Plan.last(6, 2), int8=int8):
            [score] = pop_ext.score(stock, [context], [continuation])
        expected[int8] = score.log_likelihood
    assert found == pytest.approx(expected[True], abs=1e-6)
    assert abs(expected[True] - expected[False]) > 1e-5
    with pytest.raises(ValueError, match='int8: expected False with backend="portable"'):
        PopLM(str(folder), count=2, int8=True, backend="portable")


def test_rolling_loglikelihood_equals_the_stock_model_in_windows(folder):
    model = PopLM(str(folder), count=3, max_length=16, batch_size=2)
    text = "def square(x):\n    return x * x\nprint(square(4))"
    [found] = model.loglikelihood_rolling(requests("loglikelihood_rolling", (text,)), disable_tqdm=True)
    stock = AutoModelForCausalLM.from_pretrained(folder)
    ids = torch.tensor([model.prefix_token_id, *model.tok_encode(text)])
    total = 0.0
    for begin in range(1, len(ids), 16):  # the last window reaches back to be as long as the others
        end = min(begin + 16, len(ids))
        start = max(0, end - 17)
        with torch.no_grad():
            rows = stock(ids[None, start : end - 1]).logits[0, begin - 1 - start :].log_softmax(-1)
        total += float(rows.gather(1, ids[begin:end, None]).sum())
    assert found == pytest.approx(total, abs=1e-3)


def test_generate_until_equals_generate_up_to_a_stop_text(model):
    prompt = "def square(x):\n    return"
    ids = torch.tensor([model.tok_encode(prompt)])
    made = model.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)
    assert pop_ext.last_call(model.model) is not None
    whole = model.tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True)
    free = {"until": [], "max_gen_toks": 8, "temperature": 0.0}
    [found] = model.generate_until(requests("generate_until", (prompt, free)), disable_tqdm=True)
    assert found == whole
    stop = whole[3:5]
    [cut] = model.generate_until(requests("generate_until", (prompt, {**free, "until": [stop]})), disable_tqdm=True)
    assert cut == whole.partition(stop)[0]


def test_a_context_too_long_loses_its_beginning(folder):
    model = PopLM(str(folder), count=2, max_length=8)
    long, short = model.loglikelihood(requests("loglikelihood", ("a" * 30, "bc"), ("a" * 7, "bc")), disable_tqdm=True)
    assert long == short
    with pytest.raises(ValueError, match=r"continuation: expected at most 8 tokens \(max_length\), got 9"):
        model.loglikelihood(requests("loglikelihood", ("a", "b" * 9)), disable_tqdm=True)


def test_a_context_keeps_its_end_for_any_number_of_new_tokens(folder, monkeypatch):
    model, seen = PopLM(str(folder), count=2, max_length=8), []
    generate = model.model.generate
    monkeypatch.setattr(
        model.model, "generate", lambda ids, **how: seen.append(ids[0].tolist()) or generate(ids, **how)
    )
    wanted = model.tok_encode("abcdefghij")
    for new, room in ((3, 5), (8, 1), (9, 1)):
        how = {"until": [], "max_gen_toks": new}
        model.generate_until(requests("generate_until", ("abcdefghij", how)), disable_tqdm=True)
        assert seen.pop() == wanted[-room:]


def test_only_the_default_gpu_is_replaced_by_the_cpu(folder, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=r"device: expected cpu \(torch finds no CUDA device\), got 'cuda'"):
        PopLM(str(folder), count=2, device="cuda")
    with pytest.warns(UserWarning, match="the CPU instead of cuda:0"):  # the harness's default
        assert PopLM(str(folder), count=2, device="cuda:0").model.device.type == "cpu"


def test_max_length_comes_from_the_text_config(folder, monkeypatch):
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    text = copy.deepcopy(loaded.config)
    monkeypatch.setattr(type(loaded.config), "get_text_config", lambda self, *args, **kwargs: text)
    text.max_position_embeddings = 77
    assert PopLM(loaded, AutoTokenizer.from_pretrained(folder), count=2).max_length == 77


def test_two_plans_or_an_unknown_dtype_are_refused(folder):
    with pytest.raises(ValueError, match="omit and count: expected one of them"):
        PopLM(str(folder), omit="1", count=2)
    with pytest.raises(ValueError, match="dtype: expected one of auto, float32, bfloat16, float16, got 'int8'"):
        PopLM(str(folder), dtype="int8")


def test_a_bad_list_of_layers_is_refused_by_the_name_omit(folder):
    with pytest.raises(ValueError, match="^omit: expected layers like 22-31 or 8,9,11, got '3-x'"):
        PopLM(str(folder), omit="3-x")


def test_the_harness_runs_tasks_of_local_files(model, tasks):
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    names = [f"pop_test_{name}" for name in TASKS]
    results = simple_evaluate(model, tasks=names, task_manager=manager, bootstrap_iters=0)["results"]
    assert results["pop_test_choice"]["acc,none"] in (0.0, 0.5, 1.0)
    assert results["pop_test_rolling"]["bits_per_byte,none"] > 0
    assert results["pop_test_continue"]["exact_match,none"] == 0.0


def test_the_command_line_of_the_harness_knows_pop(folder, tasks, tmp_path):
    command = [sys.executable, "-m", "pop_ext.lm_eval", "run", "--model", "pop"]
    command += ["--model_args", f"pretrained={folder},omit=2+4-5,boundary=3,fp8=True", "--tasks", "pop_test_choice"]
    command += ["--include_path", str(tasks), "--output_path", str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(Path(pop_ext.__file__).parents[1]), "HF_DATASETS_OFFLINE": "1"}
    run = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert run.returncode == 0, run.stderr[-2000:]
    assert "pop_test_choice" in run.stdout
