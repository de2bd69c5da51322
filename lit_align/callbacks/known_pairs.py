"""Whether the reference's errors were computed for the pairs of this run."""

import lightning as L

from lit_align.data import PreferenceDataModule
from lit_align.data.pair_identity import describe_pairs
from lit_align.training.module import AlignmentModule


class KnownPairs(L.Callback):
    """Refuses `model.reference_errors` of other shards, labels or augmentation before one of their pairs comes up."""

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, AlignmentModule)
        data = getattr(trainer, "datamodule", None)
        if pl_module.reference.folder is not None and isinstance(data, PreferenceDataModule):
            pl_module.reference.check_pairs(trainer, describe_pairs(data))
