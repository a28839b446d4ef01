"""Targets and corpus to a trained memory."""
