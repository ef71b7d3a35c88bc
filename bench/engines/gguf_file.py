"""Convert a Llama checkpoint to a GGUF file for llama.cpp, in the dtype of the checkpoint."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

_LAYER_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
_TOP_NAMES = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
_STORED = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype("<u2")}


def write_gguf(weights: str, out: str) -> None:
    """Write a GGUF file from config.json and the safetensors of a folder.

    Args:
        weights: folder of a Llama model, as written by ``save_pretrained``; plain RoPE, no biases.
        out: the file to write.

    Raises:
        ValueError: the architecture or the RoPE is not supported.
    """
    import gguf

    folder = Path(weights)
    config = json.loads((folder / "config.json").read_text())
    check_config(config)
    writer = gguf.GGUFWriter(out, "llama")
    writer.add_vocab_size(config["vocab_size"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_freq_base(rope_theta(config))
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_tokenizer_model("no_vocab")
    kinds = {"F32": gguf.GGMLQuantizationType.F32, "F16": gguf.GGMLQuantizationType.F16}
    kinds["BF16"] = gguf.GGMLQuantizationType.BF16
    for name, kind, tensor in stored_tensors(folder):
        if name == "lm_head.weight" and config.get("tie_word_embeddings"):
            continue
        array = arrange(name, tensor, config)
        if array.ndim == 1:  # llama.cpp expects norms in float32
            kind, array = "F32", as_float32(kind, array)
        if kind == "BF16":  # numpy has no bfloat16: raw bytes, whose last dimension counts bytes
            array = np.ascontiguousarray(array).view(np.uint8)
        writer.add_tensor(gguf_name(name), array, raw_dtype=kinds[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def check_config(config: dict[str, Any]) -> None:
    """Refuse a config that the GGUF file could not express.

    Raises:
        ValueError: names the member of the config.
    """
    if config["model_type"] != "llama":
        raise ValueError(f"model_type: expected llama, the only supported architecture, got {config['model_type']}")
    kind = (config.get("rope_parameters") or config.get("rope_scaling") or {}).get("rope_type", "default")
    if kind != "default":
        raise ValueError(f"rope_type: expected default, got {kind}")
    if config.get("attention_bias") or config.get("mlp_bias"):
        raise ValueError("attention_bias, mlp_bias: expected false, got true")


def rope_theta(config: dict[str, Any]) -> float:
    """Return the base of RoPE; releases of transformers store it in different places."""
    return float((config.get("rope_parameters") or {}).get("rope_theta") or config["rope_theta"])


def stored_tensors(folder: Path) -> Iterator[tuple[str, str, np.ndarray]]:
    """Yield ``(name, dtype, array)`` of every tensor in a folder's safetensors files; bfloat16 as its 16 bits."""
    for path in sorted(folder.glob("*.safetensors")):
        raw = np.memmap(path, dtype=np.uint8, mode="r")
        size = int(raw[:8].view("<u8")[0])
        header = json.loads(bytes(raw[8 : 8 + size]))
        for name, facts in header.items():
            if name == "__metadata__":
                continue
            first, last = (8 + size + offset for offset in facts["data_offsets"])
            yield name, facts["dtype"], raw[first:last].view(_STORED[facts["dtype"]]).reshape(facts["shape"])


def gguf_name(name: str) -> str:
    """Translate a weight's name: "model.layers.3.mlp.up_proj.weight" -> "blk.3.ffn_up.weight".

    Raises:
        ValueError: a Llama has no such weight.
    """
    stem, _, kind = name.rpartition(".")
    if stem in _TOP_NAMES:
        return f"{_TOP_NAMES[stem]}.{kind}"
    layer, _, part = stem.removeprefix("model.layers.").partition(".")
    if not layer.isdigit() or part not in _LAYER_NAMES:
        raise ValueError(f"weights: expected those of a Llama, got {name}")
    return f"blk.{layer}.{_LAYER_NAMES[part]}.{kind}"


def arrange(name: str, tensor: np.ndarray, config: dict[str, Any]) -> np.ndarray:
    """Reorder the rows of Q and K for llama.cpp.

    Its RoPE rotates neighbouring channels of a head; Hugging Face's rotates channels of the two halves.
    """
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    part = name.split(".")[-2]
    if part not in heads:
        return tensor
    rows, columns = tensor.shape
    halves = tensor.reshape(heads[part], 2, rows // heads[part] // 2, columns)
    return halves.swapaxes(1, 2).reshape(rows, columns)


def as_float32(kind: str, array: np.ndarray) -> np.ndarray:
    """Convert an array of any stored dtype to float32."""
    if kind == "BF16":
        return (array.astype(np.uint32) << 16).view(np.float32)
    return array.astype(np.float32)
