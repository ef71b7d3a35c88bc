"""Benchmarks of pop_ext against Hugging Face: ``python bench/run.py``."""
