"""Callbacks that write the outputs of a run and show its progress."""
