"""What a model learned of single records, and what must not reach it."""
