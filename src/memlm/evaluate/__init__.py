"""Scores, perplexity, choice of mix_weight, reports."""
