"""Plans: which layers a prefill omits, where a plan comes from, and its fitted projections."""
