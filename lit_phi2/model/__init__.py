"""Phi-2, its adapter, its loss, and the LightningModule around them; knows nothing of files of records."""
