"""Load vLLM servers, plain and with pruned prefills: the parts of ``bench/serve.py``."""
