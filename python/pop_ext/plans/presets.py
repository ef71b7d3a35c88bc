"""Plans for published models and their siblings."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pop_ext.plans.origin import snapshot_id
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

    def names_checkpoint(self, name: str | None) -> bool:
        """Return True if a hub id, or a snapshot of it in the hub's cache, is one of this preset's names."""
        hub_id = None if name is None else snapshot_id(name)
        if hub_id is None and name is not None and not os.path.isdir(name):  # a folder may be called like a hub id
            hub_id = name
        return hub_id is not None and hub_id.lower() in (known.lower() for known in self.names)


def _preset(entry: PresetEntry) -> Preset:
    plan = Plan.last(entry.num_layers, count=entry.omitted)
    return Preset(entry.names, entry.config, plan, entry.published, entry.source)


_PRESETS = tuple(_preset(entry) for entry in ENTRIES)

PRESETS: Mapping[str, Preset] = {name: preset for preset in _PRESETS for name in preset.names}
"""Presets by the Hugging Face name of the model."""


def find_preset(config: Any) -> Preset | None:
    """Return the preset whose config matches, or None.

    Args:
        config: Hugging Face config. Of a config with several parts, the text config is used.
    """
    if hasattr(config, "get_text_config"):
        config = config.get_text_config()
    return next((preset for preset in _PRESETS if preset.matches(config)), None)


def preset_or_third(config: Any) -> Plan:
    """Return the plan of the preset whose config matches; where none does, the plan that omits the deepest third.

    Args:
        config: Hugging Face config. Of a config with several parts, the text config is used.
    """
    if hasattr(config, "get_text_config"):
        config = config.get_text_config()
    preset = find_preset(config)
    return Plan.last(config.num_hidden_layers) if preset is None else preset.plan
