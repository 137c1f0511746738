"""Greedy decoding."""
