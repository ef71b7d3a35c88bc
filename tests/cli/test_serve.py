"""`pop-ext serve`: the server of transformers with pruned prefills, over HTTP, and the command that starts vLLM's."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections import deque
from contextlib import contextmanager

import models
import openai
import pop_ext
import pytest
import uvicorn
from batched_requests import OracleRequest
from model_folder import save_tiny_llama, save_tokenizer
from pop_ext import Plan
from pop_ext.cli import serve as serve_module
from pop_ext.cli.app import app
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

pytestmark = [pytest.mark.cpu, pytest.mark.timeout(300)]

PROMPT = "def square(x):\n    return x * x\n" * 2
PLAN = Plan(6, (3, 4), 2)
OTHER = "and more"
NEW = 8
SMALL = ("--device", "cpu", "--cb-num-blocks", 64, "--cb-max-batch-tokens", 128)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_llama(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def plan_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("plan") / "plan.json"
    PLAN.save(path)
    return path


def free_port():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


class Server:
    """A server in a process of its own.

    Attributes:
        url: of its API.
        lines: last lines that it printed.
    """

    def __init__(self, *arguments):
        port = free_port()
        command = [sys.executable, "-m", "pop_ext", "serve", *map(str, arguments), "--port", str(port)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        self.url, self.lines = f"http://localhost:{port}", deque(maxlen=200)
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
        )
        threading.Thread(target=lambda: self.lines.extend(self.process.stdout), daemon=True).start()

    def wait(self, seconds=120.0):
        end = time.monotonic() + seconds
        while time.monotonic() < end and self.process.poll() is None:
            try:
                return self.get("/health")
            except OSError:
                time.sleep(0.2)
        raise RuntimeError(f"expected a server at {self.url}, got\n{''.join(self.lines)}")

    def get(self, path):
        with urllib.request.urlopen(self.url + path, timeout=30) as answer:
            return json.loads(answer.read())

    def stop(self):
        self.process.send_signal(signal.SIGINT)
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()


@contextmanager
def serving(*arguments):
    server = Server(*arguments)
    try:
        server.wait()
        yield server
    finally:
        server.stop()


@pytest.fixture(scope="module")
def server(folder, plan_file):
    with serving(folder, "--plan", plan_file, "--strict", *SMALL) as running:
        yield running


def complete(server, folder, prompt=PROMPT, **options):
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60)
    return client.completions.create(model=str(folder), prompt=prompt, max_tokens=NEW, temperature=0, **options)


def oracle_text(folder, plan, prompt=PROMPT):
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    ids = tokenizer(prompt)["input_ids"]
    request = OracleRequest(model.eval(), plan, ids)
    request.step(0, len(ids))
    for position in range(len(ids), len(ids) + NEW - 1):
        request.step(position, 1)
    return tokenizer.decode(request.ids[len(ids) :], skip_special_tokens=True)


def test_a_completion_is_the_text_of_the_oracle(server, folder):
    answer = complete(server, folder)
    assert answer.choices[0].text == oracle_text(folder, PLAN)
    assert answer.usage.prompt_tokens == len(PROMPT)
    assert oracle_text(folder, PLAN) != oracle_text(folder, Plan(6, ()))


def test_a_streamed_completion_comes_in_parts_and_is_the_same_text(server, folder):
    parts = [part.choices[0].text for part in complete(server, folder, PROMPT + OTHER, stream=True) if part.choices]
    assert len([part for part in parts if part]) > 1
    assert "".join(parts) == oracle_text(folder, PLAN, PROMPT + OTHER)


def test_requests_at_once_get_an_answer_each(server, folder):
    prompts = [PROMPT + str(number) for number in range(6)]
    texts = [""] * len(prompts)

    def ask(number):
        texts[number] = complete(server, folder, prompts[number]).choices[0].text

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(len(prompts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert all(texts)


def test_one_line_at_the_start_names_plan_fit_and_ceiling(server, folder):
    [line] = [line for line in server.lines if line.startswith("pop-ext: ")]
    assert str(folder) in line
    assert "prefills omit 2 of 6 layers (3-4), boundary 2, unfitted; FLOP ceiling of a prefill 1." in line
    assert "x at 2,048 tokens" in line


def test_sequential_requests_prefill_by_generate(folder, plan_file):
    with serving(folder, "--plan", plan_file, "--sequential", "--device", "cpu") as running:
        assert complete(running, folder).choices[0].text == oracle_text(folder, PLAN)


@pytest.mark.parametrize("mode", [(), ("--sequential",)])
def test_8_bit_products_are_announced_and_run(folder, plan_file, mode, monkeypatch):
    models_served, announce = [], serve_module.enable_and_announce
    monkeypatch.setattr(uvicorn.Server, "run", lambda _: None)
    monkeypatch.setattr(
        serve_module, "enable_and_announce", lambda model, *rest: (models_served.append(model), announce(model, *rest))
    )
    result = run(folder, "--plan", plan_file, "--int8", *mode, *(SMALL if not mode else ("--device", "cpu")))
    assert result.exit_code == 0, result.output
    assert "boundary 2, unfitted, int8 products; FLOP ceiling" in result.stderr
    [model] = models_served
    if mode:
        model.generate(
            AutoTokenizer.from_pretrained(folder)(PROMPT, return_tensors="pt")["input_ids"], max_new_tokens=1
        )
    assert pop_ext.last_call(model).int8


def run(*arguments):
    return CliRunner().invoke(app, ["serve", *map(str, arguments)])


@pytest.fixture
def capped(tmp_path):
    """A Gemma 2, every step of which is declined: continuous batching leaves out its soft cap."""
    models.gemma2().save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    return tmp_path


def test_under_strict_a_server_that_cannot_prune_does_not_start_and_says_why(capped):
    result = run(capped, "--plan", "third", "--strict", *SMALL, "--attn-implementation", "eager")
    assert result.exit_code == 1
    assert "leaves out the soft cap" in result.stderr.splitlines()[-1]


def test_without_strict_it_serves_at_full_depth_and_says_why(capped, monkeypatch):
    monkeypatch.setattr(uvicorn.Server, "run", lambda _: None)
    result = run(capped, "--plan", "third", *SMALL, "--attn-implementation", "eager")
    assert result.exit_code == 0
    assert "the stock forward runs" in result.stderr
    assert "leaves out the soft cap" in result.stderr


def test_a_request_that_is_declined_later_under_strict_gets_an_error(folder, plan_file, monkeypatch):
    stock, answers, port = uvicorn.Server.run, [], free_port()
    body = {"model": str(folder), "prompt": PROMPT, "max_tokens": NEW, "temperature": 0}
    call = urllib.request.Request(f"http://localhost:{port}/v1/completions", json.dumps(body).encode())
    call.add_header("content-type", "application/json")

    def hook_a_layer(model, _):
        model.model.layers[3].mlp.register_forward_hook(print)

    def ask(server):
        thread = threading.Thread(target=stock, args=(server,))
        thread.start()
        while not server.started:
            time.sleep(0.1)
        for _ in range(2):
            with pytest.raises(urllib.error.HTTPError) as error:
                urllib.request.urlopen(call, timeout=60)
            answers.append((error.value.status, error.value.read().decode()))
        server.should_exit = True
        thread.join()

    monkeypatch.setattr(serve_module, "check_steps", hook_a_layer)
    monkeypatch.setattr(uvicorn.Server, "run", ask)
    assert run(folder, "--plan", plan_file, "--strict", *SMALL, "--port", port).exit_code == 0
    assert answers[0][0] in (500, 503)  # transformers answers before or after it has noted that its thread has ended
    assert answers[1][0] == 503
    assert "strict=True" in answers[1][1]
    assert "hooks" in answers[1][1]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("--engine", "sglang"), "--engine: expected transformers or vllm, got 'sglang'"),
        (("--engine", "vllm", "--strict"), "--strict: expected it only with --engine transformers"),
        (("--engine", "vllm", "--sequential"), "--sequential: expected it only with --engine transformers"),
        (("--engine", "vllm", "--int8"), "--int8: expected it only with --engine transformers"),
        (("--int8", "--fp8"), "--int8 and --fp8: expected one of them"),
        (("--fp8",), "--fp8: expected it only with --sequential"),
        (("--plan", "none.json"), "none.json"),
    ],
)
def test_bad_options_are_named(folder, arguments, text):
    result = run(folder, *arguments)
    assert result.exit_code == 2
    assert text in result.stderr


def test_8_bit_products_that_the_model_cannot_have_end_the_server(tmp_path):
    models.mixtral().save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    result = run(tmp_path, "--plan", "third", "--int8", *SMALL)
    assert result.exit_code == 2
    assert "--int8: expected a model without experts" in result.stderr


def test_an_option_that_the_server_does_not_know_is_refused(folder):
    result = run(folder, "--plan", "third", "--prot", 8000)
    assert result.exit_code == 2
    assert "--prot" in result.stderr


def test_packages_that_the_server_lacks_are_named(folder, monkeypatch):
    monkeypatch.setattr(serve_module.importlib.util, "find_spec", lambda name: None if name == "uvicorn" else name)
    result = run(folder)
    assert result.exit_code == 2
    assert "needs uvicorn: pip install 'pop_ext[serve]'" in result.stderr


def test_the_server_builds_its_own_manager_again_afterwards(folder, monkeypatch):
    from transformers.cli.serving import model_manager

    stock = model_manager.ModelManager
    monkeypatch.setattr(uvicorn.Server, "run", lambda _: None)
    assert run(folder, "--plan", "third", "--device", "cpu").exit_code == 0
    assert model_manager.ModelManager is stock


# vLLM


def test_the_server_of_vllm_is_named_where_it_is_missing(folder, monkeypatch):
    monkeypatch.setattr(serve_module.importlib.util, "find_spec", lambda name: None)
    result = run(folder, "--engine", "vllm")
    assert result.exit_code == 2
    assert "--engine vllm: expected vllm in this environment" in result.stderr


@pytest.mark.parametrize("given", [["--additional-config", "{}"], ["--additional-config={}"]])
def test_a_configuration_that_would_replace_the_plan_is_refused(given, folder, monkeypatch):
    monkeypatch.setattr(serve_module.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(os, "execv", lambda path, command: pytest.fail("expected no server"))
    result = run(folder, "--engine", "vllm", *given)
    assert result.exit_code == 2
    assert "--additional-config: expected none beside --engine vllm" in result.stderr


def test_the_server_of_vllm_starts_with_the_arguments_of_the_plugin(folder, plan_file, monkeypatch):
    started = []
    monkeypatch.setattr(serve_module.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(os, "execv", lambda path, command: started.append((path, command)))
    result = run(folder, "--engine", "vllm", "--plan", plan_file, "--port", 9000)
    assert result.exit_code == 0, result.output
    [(path, command)] = started
    assert path == sys.executable
    assert command[1:5] == ["-m", "vllm.entrypoints.openai.api_server", "--model", str(folder)]
    assert command[-2:] == ["--port", "9000"]
    given = dict(zip(command[5:-2:2], command[6:-2:2], strict=True))
    expected = pop_ext.vllm.engine_arguments(folder, plan_file)
    assert {name: json.loads(value) for name, value in given.items()} == {
        f"--{name.replace('_', '-')}": value for name, value in expected.items()
    }
    assert "prefills omit 2 of 6 layers (3-4), boundary 2" in result.stderr
