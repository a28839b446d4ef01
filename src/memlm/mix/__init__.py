"""Base plus memory: one distribution."""
