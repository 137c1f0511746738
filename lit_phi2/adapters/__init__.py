"""An adapter as a value, on disk in PEFT form, and inside a checkpoint."""
