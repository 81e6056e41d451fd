"""Slow, obvious float64 versions of what the library computes; nothing here imports the library."""
