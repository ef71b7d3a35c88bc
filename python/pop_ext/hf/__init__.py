"""The Hugging Face side: what a model, its caches and its calls meet, in the order of a call."""
