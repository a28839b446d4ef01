"""Causal language models: fetching, loading, tokenizer fingerprint, tap and head."""
