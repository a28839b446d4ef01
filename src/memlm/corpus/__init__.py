"""Text to token blocks, and which token each position predicts."""
