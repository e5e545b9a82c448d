"""Searching a gallery by its vectors, without tiles: an index, and rankings from it."""
