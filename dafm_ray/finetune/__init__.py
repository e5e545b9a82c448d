"""Training sub-models on triplets of reference, modification text and target."""
