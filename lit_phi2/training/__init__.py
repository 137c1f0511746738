"""The LightningModule, the Trainer and what a run shows and keeps."""
