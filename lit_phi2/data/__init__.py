"""Records in files -> batches; independent of the model."""
