"""What voters think of every label of a text: one table, which mixtures, intervals and reports read."""
