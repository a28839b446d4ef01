"""Teacher activations to keys, values and a searchable index."""
