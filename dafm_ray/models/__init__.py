"""Frozen sub-models: what turns images and modification texts into features and scores."""
