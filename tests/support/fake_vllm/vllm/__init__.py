"""The parts of vLLM that bench/serve.py runs, made up: a server whose work is known, and a load generator."""
