"""What a run shows and keeps: checkpoints, samples, predictions, completions of test, throughput."""
