"""Phi-2, its LoRA layers and its loss; independent of files of records."""
