"""The memories: one protocol, one file per kind."""
