"""Questions about the architecture of a Hugging Face model, answered from the table of families."""

from __future__ import annotations

from operator import attrgetter
from typing import Any

from pop_ext.hf.families import FAMILIES, find_family
from pop_ext.hf.family import Family, VisionSpec
from pop_ext.plans.presets import PRESETS, Preset


def family_of(config: Any) -> Family | None:
    """Return the family of a model's config, or None if the architecture is not supported natively."""
    model_type = getattr(config, "model_type", None)
    if not isinstance(model_type, str):
        return None
    return find_family(model_type, model_type if model_type in FAMILIES else _text_model_type(config))


def _text_model_type(config: Any) -> str:
    """Return ``model_type`` of the config of a model's language model; an empty text without one."""
    read = getattr(config, "get_text_config", None)
    return getattr(read(decoder=True), "model_type", None) or "" if read is not None else ""


def vision_of(model: Any) -> VisionSpec | None:
    """Return the wrapper of a vision-language model, or None if the model is text-only or not supported natively."""
    family = family_of(getattr(model, "config", None))
    return None if family is None else family.vision


def decoder_path(model: Any) -> str:
    """Return the module path of a model's language model without its head."""
    family = family_of(model.config)
    return "model" if family is None else family.decoder


def decoder_of(model: Any) -> Any:
    """Return a model's language model without its head."""
    return attrgetter(decoder_path(model))(model)


def dropped_softcap_reason(config: Any) -> str | None:
    """Return why the stock attention ignores the soft cap of attention scores, or None if it applies the cap.

    The native attention always applies it. transformers' sdpa attention does not support it, and the releases that
    let Gemma 2 run with sdpa (5.17) compute other results than the model was trained for.
    """
    family = FAMILIES.get(getattr(config, "model_type", ""))
    if family is None or not family.caps_scores or not getattr(config, "attn_logit_softcapping", None):
        return None
    if getattr(config, "_attn_implementation", None) != "sdpa":
        return None
    return (
        f"attention implementation sdpa: it leaves out the soft cap of scores ({config.attn_logit_softcapping}), which "
        'the native prefill applies; load the model with attn_implementation="eager" or flash attention'
    )


PORTABLE_ADVICE = 'pop_ext.enable with backend="portable" works for this model.'
"""End of the text of an ``UnsupportedModelError`` for a model that the portable backend runs."""


class UnsupportedModelError(ValueError):
    """Raised for a model that the native backend does not run. The text says why, and what works instead."""


def supported_models() -> dict[str, Preset]:
    """Return the presets of all models whose language model runs natively, by Hugging Face name.

    Any other model of the same architectures runs as well. Only published presets run without being named.

    Returns:
        Hugging Face name -> ``Preset``. ``preset.published`` is True where the number of omitted layers comes from
        the paper (POP, arXiv 2602.03295), and False where it is a suggestion of this project, which runs only if it is
        named.
    """
    return {name: preset for name, preset in PRESETS.items() if preset.config["model_type"] in FAMILIES}
