"""Combining the scores of several sub-models into one ranking."""
