"""Plans for published models, and the default plan of any other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pop_ext.plans.plan import Plan
from pop_ext.plans.preset_table import ENTRIES, PresetEntry


@dataclass(frozen=True)
class Preset:
    """A plan and the models that it is for.

    Attributes:
        names: Hugging Face names of the models.
        config: Members of the models' (text) config that tell their shape. Models of one shape share a preset.
        plan: The plan.
        published: True if the paper gives the number of omitted layers for this model.
        source: Where the number of omitted layers comes from.
    """

    names: tuple[str, ...]
    config: Mapping[str, Any]
    plan: Plan
    published: bool
    source: str

    def matches(self, config: Any) -> bool:
        """Return True if a (text) config has every member of this preset's config."""
        return all(getattr(config, name, None) == value for name, value in self.config.items())


def _preset(entry: PresetEntry) -> Preset:
    plan = Plan.last(entry.num_layers, count=entry.omitted)
    return Preset(entry.names, entry.config, plan, entry.published, entry.source)


_PRESETS = tuple(_preset(entry) for entry in ENTRIES)

PRESETS: Mapping[str, Preset] = {name: preset for preset in _PRESETS for name in preset.names}
"""Presets by the Hugging Face name of the model."""


def default_plan(config: Any) -> Plan:
    """Return the plan for a model when the caller names none.

    This is the plan of the preset whose config matches. Where none matches, the plan omits the deepest third.

    Args:
        config: Hugging Face config. Of a config with several parts, the text config is used.

    Returns:
        The plan, with a boundary of 1.
    """
    if hasattr(config, "get_text_config"):
        config = config.get_text_config()
    for candidate in _PRESETS:
        if candidate.matches(config):
            return candidate.plan
    return Plan.last(config.num_hidden_layers)
