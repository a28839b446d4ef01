"""Neighbours to sparse next-token distributions."""
