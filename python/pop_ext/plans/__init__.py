"""Plans: the layers that a prefill omits, the origin of a plan, presets, and fitted K/V projections."""
