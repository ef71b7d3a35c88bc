"""bench/peers.py times engines that compute the same result, and reports why others are missing."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_llama import SIZES

ROOT = Path(__file__).resolve().parents[2]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from bench import peers  # noqa: E402
from bench.engines import comparison, environments  # noqa: E402
from bench.engines.catalogue import PEERS, Peer  # noqa: E402
from bench.engines.comparison import logits_error  # noqa: E402
from bench.engines.environments import InstallError, venv_python  # noqa: E402
from bench.engines.gguf_file import arrange, as_float32, check_config, gguf_name, stored_tensors  # noqa: E402
from bench.engines.log_probs import log_probs_of  # noqa: E402
from bench.engines.process import Child, ChildError  # noqa: E402

pytestmark = pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="holds engines to cores, on Linux")

FAKES = {name: Peer(name, "tests.support.peer_engine", ()) for name in ("fake", "dying", "absent")}
CPUS = sorted(os.sched_getaffinity(0))[:1] if hasattr(os, "sched_getaffinity") else [0]


@pytest.fixture
def fake_peers(monkeypatch):
    """Replace the engines by made-up ones of this interpreter, one of them without a venv."""

    def python_of(peer, *arguments):
        if peer.name == "absent":
            raise InstallError("no venv")
        return Path(sys.executable)

    for name, peer in FAKES.items():
        monkeypatch.setitem(PEERS, name, peer)
    monkeypatch.setattr(comparison, "venv_python", python_of)


def test_engines_are_timed_and_checked_and_gaps_have_reasons(folder, fake_peers, capsys):
    options = ["--model", str(folder / "tiny"), "--lengths", "20", "--dtype", "float32", "--threads", "1"]
    options += ["--peers", "fake", "dying", "absent", "--no-compile", "--repeats", "2", "--warmup", "1", "--quiet"]
    path = folder / "report.json"
    code = peers.main([*options, "--folder", str(folder), "--json", str(path)])
    printed = capsys.readouterr().out
    assert code == 1, "an arm without a figure must show in the exit status"
    [case] = json.loads(path.read_text())["peers"]
    arms = {arm["name"]: arm for arm in case["arms"]}
    assert list(arms) == ["hf-eager", "native-full", "pop 1/4", "right", "wrong", "raises", "dies"]
    for name in ("hf-eager", "native-full", "pop 1/4", "right"):
        assert arms[name]["failed"] is None, name
        assert len(arms[name]["samples_s"]) == 2
    assert arms["right"]["same_token"] is True
    assert max(arms["right"]["logits_error"], arms["native-full"]["logits_error"]) < 1e-3
    assert arms["right"]["times_as_long_as"]["native-full"]["of_medians"] == pytest.approx(
        arms["right"]["median_s"] / arms["native-full"]["median_s"]
    )
    assert "differ from hf-eager's" in arms["wrong"]["failed"]
    assert arms["raises"]["failed"] == "ChildError: RuntimeError: no such kernel"
    assert "it ended with code 3" in arms["dies"]["failed"]
    assert case["not_measured"] == {"absent": "no venv"}
    assert "not measured: absent: no venv" in printed
    assert "failed: ChildError: RuntimeError: no such kernel" in printed
    assert case["engines"][1]["versions"] == {"torch": torch.__version__}


def test_an_engine_beyond_free_memory_is_not_started(folder, fake_peers, monkeypatch):
    monkeypatch.setattr(comparison, "available_bytes", lambda device: 1)
    options = ["--model", str(folder / "tiny"), "--lengths", "4", "--peers", "--quiet", "--folder", str(folder)]
    assert peers.main([*options, "--json", str(folder / "report.json")]) == 1
    [case] = json.loads((folder / "report.json").read_text())["peers"]
    assert list(case["not_measured"]) == ["here"]
    assert "GiB are free" in case["not_measured"]["here"]


def test_other_weights_are_saved_again(folder):
    options = ["--model", str(folder / "tiny"), "--folder", str(folder)]
    saved = peers.prepared(peers.parser().parse_args(options), CPUS).home / "weights" / "model.safetensors"
    first = saved.stat().st_mtime_ns
    peers.prepared(peers.parser().parse_args(options), CPUS)
    assert saved.stat().st_mtime_ns == first
    (folder / "tiny" / "config.json").write_text(json.dumps(SIZES | {"intermediate_size": 128}))
    peers.prepared(peers.parser().parse_args(options), CPUS)
    assert saved.stat().st_mtime_ns != first


def test_a_child_is_stopped_between_requests(tmp_path):
    child = Child(Path(sys.executable), "no.such.module", CPUS, tmp_path / "log.txt")
    try:
        with pytest.raises(ChildError, match="ModuleNotFoundError"):
            child.ask(60, op="load")
        state = f"/proc/{child._process.pid}/stat"
        wanted, deadline = "T", time.monotonic() + 10
        while (found := Path(state).read_text().rpartition(")")[2].split()[0]) != wanted:
            assert time.monotonic() < deadline, f"expected state {wanted}, got {found}"
            time.sleep(0.01)
        with pytest.raises(ChildError, match="ModuleNotFoundError"):
            child.ask(60, op="load")
    finally:
        child.close()
    assert child._process.poll() is not None


def test_a_child_that_exceeds_its_timeout_is_killed(tmp_path):
    child = Child(Path(sys.executable), "bench.engines.child", CPUS, tmp_path / "log.txt")
    child._process.kill()
    child._process.wait()
    with pytest.raises(ChildError, match="it ended with code -9"):
        child.ask(60, op="load")
    child.close()
    slow = Child(Path(sys.executable), "tests.slow_engine", CPUS, tmp_path / "log.txt")
    with pytest.raises(ChildError, match="no answer within 0 s"):
        slow.ask(0.0, op="load")
    assert slow._process.poll() is not None


def test_a_venv_is_created_again_for_other_requirements(tmp_path, monkeypatch):
    ran = []

    def run(command, log):
        ran.append(command[1:4] if "venv" in command else command[2:])
        python = tmp_path / "some" / "bin" / "python"
        python.parent.mkdir(parents=True, exist_ok=True)
        python.touch()

    monkeypatch.setattr(environments, "_run", run)
    peer = Peer("some", "module", (("a==1", "torch=={torch}"), ("--no-deps", "b")), uninstall=("c",))
    with pytest.raises(InstallError, match="--no-install was given"):
        venv_python(peer, tmp_path, "2.13.0", False, print)
    python = venv_python(peer, tmp_path, "2.13.0", True, print)
    assert python == tmp_path / "some" / "bin" / "python"
    made = [["pip", "install", "a==1", "torch==2.13.0"], ["pip", "install", "--no-deps", "b"]]
    assert ran == [["-m", "venv", "--clear"], *made, ["pip", "uninstall", "-y", "c"]]
    venv_python(peer, tmp_path, "2.13.0", True, print)
    assert len(ran) == 4
    venv_python(peer, tmp_path, "2.14.0", True, print)
    assert len(ran) == 8


def test_a_failed_install_is_reported_in_one_line(tmp_path):
    peer = Peer("broken", "module", (("--no-index", "no-such-package-of-any-name"),))
    with pytest.raises(InstallError, match=r"pip install --no-index ... failed: ERROR: No matching distribution"):
        venv_python(peer, tmp_path, "2.13.0", True, lambda text: None)
    newer = Peer("newer", "module", (), python=(9, 0))
    with pytest.raises(InstallError, match=r"expected Python 9.0 or newer, got "):
        venv_python(newer, tmp_path, "2.13.0", True, lambda text: None)


def test_logits_error_tells_rounding_from_another_model():
    logits = torch.randn(500, generator=torch.Generator().manual_seed(0))
    reference = log_probs_of(logits, None)
    assert sum(np.exp(list(reference.values()))) == pytest.approx(1.0)
    assert list(log_probs_of(logits, 3)) == logits.topk(3).indices.tolist()
    assert logits_error(log_probs_of(logits + 7.0, 20), reference) == pytest.approx(0.0, abs=1e-6)
    assert logits_error(log_probs_of(logits.bfloat16().float(), 20), reference) < 0.02
    assert logits_error(log_probs_of(logits.roll(1), 20), reference) > 1.0


def test_a_gguf_file_has_the_weights_of_the_checkpoint(folder):
    from bench.shapes import load_model

    model = load_model(str(folder / "tiny"), torch.bfloat16, torch.device("cpu")).model
    model.save_pretrained(folder / "weights")
    stored = {name: (kind, array) for name, kind, array in stored_tensors(folder / "weights")}
    assert set(stored) == set(dict(model.named_parameters()))
    for name, parameter in model.named_parameters():
        kind, array = stored[name]
        assert kind == "BF16"
        assert np.array_equal(as_float32(kind, np.array(array)), parameter.detach().float().numpy()), name
    assert gguf_name("model.layers.3.mlp.up_proj.weight") == "blk.3.ffn_up.weight"
    assert gguf_name("model.norm.weight") == "output_norm.weight"
    with pytest.raises(ValueError, match="expected those of a Llama, got model.layers.0.self_attn.q_norm.weight"):
        gguf_name("model.layers.0.self_attn.q_norm.weight")


def test_arranged_rows_turn_neighbour_rope_into_half_rope():
    heads, dim, hidden = 3, 8, 5
    random = np.random.default_rng(0)
    weight, x, angle = (
        random.normal(size=(heads * dim, hidden)),
        random.normal(size=hidden),
        random.normal(size=dim // 2),
    )
    config = {"num_attention_heads": heads, "num_key_value_heads": 1}
    halves = (weight @ x).reshape(heads, 2, dim // 2)
    pairs = (arrange("model.layers.0.self_attn.q_proj.weight", weight, config) @ x).reshape(heads, dim // 2, 2)
    cos, sin = np.cos(angle), np.sin(angle)
    expected = np.stack([halves[:, 0] * cos - halves[:, 1] * sin, halves[:, 1] * cos + halves[:, 0] * sin], axis=-1)
    got = np.stack([pairs[..., 0] * cos - pairs[..., 1] * sin, pairs[..., 1] * cos + pairs[..., 0] * sin], axis=-1)
    assert np.allclose(got, expected)
    assert arrange("model.layers.0.self_attn.v_proj.weight", weight, config) is weight


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"model_type": "qwen3"}, "model_type: expected llama, the only supported architecture, got qwen3"),
        ({"rope_parameters": {"rope_type": "llama3"}}, "rope_type: expected default, got llama3"),
        ({"attention_bias": True}, "attention_bias, mlp_bias: expected false, got true"),
    ],
)
def test_a_checkpoint_that_gguf_cannot_express_is_refused(change, text):
    check_config(SIZES)
    with pytest.raises(ValueError, match=text):
        check_config(SIZES | change)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--lengths", "1"], "--lengths: expected integers from 2, got [1]"),
        (["--repeats", "0"], "--repeats: expected at least 1, got 0"),
        (["--threads", "100000"], "--threads: expected at least 1 and at most"),
    ],
)
def test_bad_arguments_are_named(arguments, text, capsys):
    assert peers.main(arguments) == 2
    assert text in capsys.readouterr().err
