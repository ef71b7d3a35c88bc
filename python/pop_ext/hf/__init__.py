"""Run Hugging Face models: read their weights, answer their calls and fill their caches."""
