"""Preference pairs from WebDataset shards, in an order that is a function of the seed."""

from lit_align.data.datamodule import PreferenceDataModule
from lit_align.data.samples import SampleError

__all__ = ["PreferenceDataModule", "SampleError"]
