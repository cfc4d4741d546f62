"""Instance retrieval."""
