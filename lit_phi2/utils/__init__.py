"""Helpers without knowledge of records or models."""
