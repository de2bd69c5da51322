"""Hardware overlays: each parses behind the experiments it fits, and leaves them their pairs a step."""

import pytest
import torch
import yaml

from lit_align.cli import main
from lit_align.training.strategy_checks import check_strategy
from tests.support.paths import ROOT

FOLDER = ROOT / "configs/hardware"
STEPS = 250  # optimizer steps between validations, as in the experiments
BALANCED = ("balanced_dpo_sd15", "balanced_dpo_sd21")
FULL, LORA = ("mapo_sd15", "mapo_sd21", "mapo_sdxl"), ("mapo_sdxl_lora",)
DIFFUSION = ("diffusion_dpo_sd15", "diffusion_dpo_sdxl")


def more(accumulate, *options):
    """As the overlays say for objectives that train on more pairs a step."""
    count = f"--trainer.accumulate_grad_batches={accumulate}"
    return [count, f"--trainer.val_check_interval={accumulate * STEPS}", *options]


FITS = {  # by overlay: devices in all, and pairs a step and further options by experiment
    "one_24gb": (1, dict.fromkeys(("mapo_sd15", *LORA), (16, [])) | {"balanced_dpo_sdxl_lora": (64, more(32))}),
    "one_48gb": (
        1,
        dict.fromkeys(FULL, (16, [])) | dict.fromkeys((*BALANCED, "balanced_dpo_sdxl"), (64, more(32))),
    ),
    "one_80gb": (
        1,
        dict.fromkeys(FULL + LORA, (16, []))
        | dict.fromkeys(BALANCED, (64, more(16)))
        | {"balanced_dpo_sdxl": (64, more(32, "--data.batch_size=2"))},
    ),
    "ddp_8x80gb": (
        8,
        dict.fromkeys(FULL + LORA, (16, []))
        | dict.fromkeys((*BALANCED, "balanced_dpo_sdxl", "balanced_dpo_sdxl_lora"), (64, more(4)))
        | dict.fromkeys(DIFFUSION, (2048, more(128))),
    ),
    "zero2_8x80gb": (
        8,
        dict.fromkeys(FULL, (16, []))
        | dict.fromkeys((*BALANCED, "balanced_dpo_sdxl"), (64, more(4)))
        | dict.fromkeys(DIFFUSION, (2048, more(128))),
    ),
    "fsdp2_multi_node": (
        16,
        dict.fromkeys(FULL, (16, [])) | dict.fromkeys((*BALANCED, "balanced_dpo_sdxl"), (64, more(4))),
    ),
}
PAIRS = [(overlay, config) for overlay, (_, fits) in FITS.items() for config in fits]


def test_all_overlays_are_here_and_say_what_they_are():
    assert sorted(path.stem for path in FOLDER.glob("*.yaml")) == sorted([*FITS, "cpu"])
    for name in FITS:
        first = (FOLDER / f"{name}.yaml").read_text().splitlines()[0]
        assert first.startswith("# Hardware overlay: ")
        assert f"--config configs/hardware/{name}.yaml" in first
        assert "Not run on such" in first or "not on GPUs or nodes" in first
        assert f"`{name}.yaml`" in (ROOT / "docs/training.md").read_text()


@pytest.mark.parametrize(("overlay", "config"), PAIRS)
def test_an_overlay_fits(overlay, config, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    devices, fits = FITS[overlay]
    pairs, options = fits[config]
    files = [f"--config=configs/{config}.yaml", f"--config=configs/hardware/{overlay}.yaml"]
    with pytest.raises(SystemExit) as exit_:
        main(["fit", *files, *options, "--print_config"])
    assert exit_.value.code in (0, None)
    found, alone = (
        yaml.safe_load(capsys.readouterr().out),
        yaml.safe_load((ROOT / f"configs/{config}.yaml").read_text()),
    )
    trainer, data = found["trainer"], found["data"]
    assert trainer["devices"] * trainer["num_nodes"] == devices
    assert data["batch_size"] * trainer["accumulate_grad_batches"] * devices == pairs
    assert trainer["val_check_interval"] == trainer["accumulate_grad_batches"] * STEPS
    assert trainer["precision"] == ("bf16-true" if overlay == "one_48gb" else "bf16-mixed")
    assert found["model"]["compensate_rounding"] == (overlay == "one_48gb")
    assert found["model"]["backbone"]["init_args"]["gradient_checkpointing"]
    assert found["model"]["backbone"]["init_args"]["repo"] == alone["model"]["backbone"]["init_args"]["repo"]
    now, before = found["model"]["optimizer"], alone["model"]["optimizer"]
    adam = "AdamW" in before["class_path"] or now["class_path"] == before["class_path"]
    kept = before["init_args"] if adam else ("lr", "weight_decay")  # all that Adafactor and AdamW have in common
    assert {name: now["init_args"][name] for name in kept} == {name: before["init_args"][name] for name in kept}
    assert len(trainer["callbacks"]) == len(alone["trainer"]["callbacks"])
    expected = {"ddp_8x80gb": "DDPStrategy", "fsdp2_multi_node": "FSDP2", "zero2_8x80gb": "ZeRO2"}.get(overlay)
    if expected is not None:
        assert trainer["strategy"]["class_path"].split(".")[-1] == expected
        check_strategy(trainer["strategy"]["class_path"])
    if expected in ("FSDP2", "ZeRO2"):
        assert getattr(torch.optim, found["model"]["optimizer"]["class_path"].split(".")[-1]) is torch.optim.AdamW


@pytest.mark.parametrize("name", ["deepspeed", "deepspeed_stage_2", "fsdp", "ModelParallelStrategy"])
def test_other_ways_of_sharding_are_refused_before_their_packages_are_missed(name, tmp_path):
    path = name if name != "ModelParallelStrategy" else f"lightning.pytorch.strategies.{name}"
    words = ["--config=configs/quickstart.yaml", f"--trainer.logger.init_args.save_dir={tmp_path}"]
    with pytest.raises(ValueError, match=rf"trainer\.strategy is {name}, .*.*strategies\.FSDP2 .*or to ddp"):
        main(["fit", *words, f"--trainer.strategy={path}"])
