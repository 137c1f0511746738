"""The LightningModule, the Trainer and the outputs of a run."""
