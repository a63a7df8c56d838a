"""Corpus, tokenizer, Megatron's indexed dataset, and the order of samples."""

from megatron_progressive.data.manifest import prepared_folder
from megatron_progressive.data.prepare import check, prepare
from megatron_progressive.data.samples import TrainingData

__all__ = ["TrainingData", "check", "prepare", "prepared_folder"]
