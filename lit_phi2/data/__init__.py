"""From files of records to batches; knows nothing of the model."""
