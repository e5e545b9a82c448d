"""What is searched: galleries, queries, and how to open an image by id."""
