"""Preference pairs from WebDataset shards, in an order that is a function of the seed."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lit_align.data.datamodule import PreferenceDataModule
    from lit_align.data.shards.layout import SampleError

__all__ = ["PreferenceDataModule", "SampleError"]


def __getattr__(name: str) -> Any:
    """Import public names on first use: processes that only import or inspect shards need no Lightning."""
    if name == "PreferenceDataModule":
        from lit_align.data.datamodule import PreferenceDataModule

        return PreferenceDataModule
    if name == "SampleError":
        from lit_align.data.shards.layout import SampleError

        return SampleError
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
