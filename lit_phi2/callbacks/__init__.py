"""What a run shows and keeps: samples, predictions, test answers, checkpoints, throughput."""

from lit_phi2.callbacks.answers import TestAnswers
from lit_phi2.callbacks.checkpoint import AdapterCheckpoint, WholeFiles
from lit_phi2.callbacks.predictions import PredictionWriter
from lit_phi2.callbacks.samples import SampleWriter
from lit_phi2.callbacks.throughput import ProgressBar, ProgressLines, Throughput

__all__ = [
    "AdapterCheckpoint",
    "PredictionWriter",
    "ProgressBar",
    "ProgressLines",
    "SampleWriter",
    "TestAnswers",
    "Throughput",
    "WholeFiles",
]
