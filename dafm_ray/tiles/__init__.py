"""Features and similarity tiles: made on Ray Data, kept in a store that survives a crash."""
