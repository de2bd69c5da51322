"""Options of the Trainer that cannot be meant, and callbacks that do not work, are refused by name."""

import pytest
from jsonargparse import Namespace
from lightning.pytorch.callbacks import BatchSizeFinder, EMAWeightAveraging, LearningRateFinder
from lightning.pytorch.callbacks import StochasticWeightAveraging as SWA

from lit_align.backbones import LoRA
from lit_align.training.trainer_checks import check_callbacks, check_options
from tests.support.runs import fit, make_data, make_module

GOOD = {"accumulate_grad_batches": 1, "gradient_clip_val": None, "log_every_n_steps": 0, "num_sanity_val_steps": -1}
GOOD |= {"max_steps": 3, "min_steps": None, "reload_dataloaders_every_n_epochs": 0}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"accumulate_grad_batches": 0}, r"trainer\.accumulate_grad_batches is 0; it must be at least 1\."),
        ({"gradient_clip_val": -1.0}, r"trainer\.gradient_clip_val is -1\.0; it must be at least 0\."),
        ({"log_every_n_steps": -1}, r"trainer\.log_every_n_steps is -1"),
        ({"num_sanity_val_steps": -2}, r"trainer\.num_sanity_val_steps is -2; it must be at least -1\."),
        ({"min_steps": 5}, r"trainer\.min_steps is 5, but trainer\.max_steps 3 ends the run before\."),
    ],
)
def test_options_that_cannot_be_meant(changes, message):
    check_options(Namespace(**GOOD))
    with pytest.raises(ValueError, match=message):
        check_options(Namespace(**GOOD | changes))


@pytest.mark.parametrize(
    "callback", [SWA(1e-5), BatchSizeFinder(), LearningRateFinder()], ids=lambda c: type(c).__name__
)
def test_callbacks_that_do_not_work(callback):
    with pytest.raises(ValueError, match=rf"trainer\.callbacks: {type(callback).__name__} .*Take it out"):
        check_callbacks([callback])


def test_an_average_of_weights_is_refused_before_anything_is_loaded(tmp_path):
    with pytest.raises(ValueError, match="EMAWeightAveraging averages a copy of the whole model"):
        fit(make_module(lora=LoRA(rank=2)), make_data(), tmp_path, 1, callbacks=[EMAWeightAveraging()])
