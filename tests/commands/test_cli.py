"""The command line: every config parses, dumps and runs; exports load in diffusers."""

import os
import shutil
import subprocess
import sys

import pytest
import torch
import yaml
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lit_align.backbones import LoRA, StableDiffusionXL
from lit_align.backbones.sampling import generate
from lit_align.cli import COMMANDS, main
from lit_align.commands.fit import Parser
from lit_align.user_errors import UserRuntimeError
from tests.support.configs import CONFIGS, callbacks, small_options
from tests.support.paths import PAIRS, PIPELINE, ROOT


def test_configs_are_all_here():
    names = [config.stem for config in CONFIGS]
    assert names == [
        "balanced_dpo_sd15",
        "balanced_dpo_sd21",
        "balanced_dpo_sdxl",
        "balanced_dpo_sdxl_lora",
        "diffusion_dpo_sd15",
        "diffusion_dpo_sdxl",
        "dpo_mix_sdxl_lora",
        "mapo_sd15",
        "mapo_sd21",
        "mapo_sdxl",
        "mapo_sdxl_lora",
        "quickstart",
        "quickstart_balanced_dpo",
    ]
    for config in CONFIGS:
        assert "Hardware:" in config.read_text() or "CPU cores" in config.read_text()


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.stem)
def test_config_dumps_to_itself(config, capsys):
    """What `--print_config` prints is complete and parses to the same."""

    def dump(path):
        with pytest.raises(SystemExit) as exit_:
            main(["fit", f"--config={path}", "--print_config"])
        assert exit_.value.code in (0, None)
        return yaml.safe_load(capsys.readouterr().out)

    first = dump(config)
    for part in ("trainer", "model", "data"):
        for key, value in yaml.safe_load(config.read_text())[part].items():
            if not isinstance(value, dict | list):
                assert first[part][key] == value
    objective = (
        "BalancedDPO"
        if "balanced" in config.stem
        else "DiffusionDPO"
        if config.stem.startswith(("diffusion", "dpo"))
        else "MaPO"
    )
    assert first["model"]["objective"]["class_path"] == f"lit_align.objectives.{objective}"
    assert (first["data"]["vote"] is not None) == (objective == "BalancedDPO")
    updates = [c for c in first["trainer"]["callbacks"] if c["class_path"].endswith(".ReferenceUpdate")]
    assert len(updates) == (objective == "BalancedDPO")


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.stem)
def test_config_runs_and_its_export_loads(config, tmp_path, sd15, sd21, capsys):
    main(["fit", *small_options(config, tmp_path, sd15, sd21)])
    assert sorted(path.name for path in tmp_path.rglob("step-*.png")) == ["step-0000001.png", "step-0000002.png"]
    events = EventAccumulator(str(next(tmp_path.rglob("events.out.tfevents*"))))
    events.Reload()
    assert [image.step for image in events.Images("samples")] == [1, 2]
    assert len(events.Scalars("train/loss")) == 2
    assert {"val/accuracy", "val/margin", "train/gradient_norm", "train/pairs_per_second"} <= set(
        events.Tags()["scalars"]
    )
    saved = yaml.safe_load(next(tmp_path.rglob("config.yaml")).read_text())
    assert saved["trainer"]["max_steps"] == 2

    checkpoint, output = tmp_path / "checkpoints/last.ckpt", tmp_path / "export"
    main(["export", f"--ckpt_path={checkpoint}", f"--output={output}"])
    names = sorted(path.name for path in output.iterdir())
    if "lora" in config.stem:
        assert names == ["pytorch_lora_weights.safetensors"]
    else:
        assert names == ["config.json", "diffusion_pytorch_model.safetensors"]
        unet = UNet2DConditionModel.from_pretrained(output)
        weights = torch.load(checkpoint, weights_only=True)["state_dict"]
        for name, value in unet.state_dict().items():
            assert torch.equal(value, weights[f"backbone.denoiser.{name}"])
    with pytest.raises(FileExistsError, match="export exists"):
        main(["export", f"--ckpt_path={checkpoint}", f"--output={output}"])


@pytest.mark.parametrize("lora", [None, LoRA(rank=2, alpha=6)], ids=["full", "lora"])
def test_export_gives_the_same_images(tmp_path, lora, capsys):
    """The live module, and diffusers with the exported weights, draw the same."""
    import lightning as L

    from tests.support.runs import fit, make_data, make_module

    module = make_module(lora=lora, repo=PIPELINE)
    module.optimizer = lambda parameters: torch.optim.AdamW(parameters, lr=1e-2)  # far from the base
    checkpoint = L.pytorch.callbacks.ModelCheckpoint(tmp_path, every_n_train_steps=3, save_last=True)
    fit(module, make_data(), tmp_path, steps=3, callbacks=[checkpoint])
    ours = generate(module.backbone, ["fox"], [3], 32, 32, steps=3)
    base = generate(StableDiffusionXL(str(PIPELINE)), ["fox"], [3], 32, 32, steps=3)

    main(["export", f"--ckpt_path={tmp_path}/last.ckpt", f"--output={tmp_path}/out"])
    assert f"{tmp_path}/last.ckpt: checkpoint of step 3\n" in capsys.readouterr().out
    if lora is None:
        unet = UNet2DConditionModel.from_pretrained(tmp_path / "out")
        pipeline = StableDiffusionXLPipeline.from_pretrained(PIPELINE, unet=unet)
    else:
        pipeline = StableDiffusionXLPipeline.from_pretrained(PIPELINE)
        pipeline.load_lora_weights(tmp_path / "out")
    noise = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(3))
    theirs = pipeline("fox", latents=noise, num_inference_steps=3, height=32, width=32, output_type="np").images
    theirs = torch.from_numpy(theirs).permute(0, 3, 1, 2) * 255
    assert (theirs - ours.float()).abs().max() <= 1
    assert (base.float() - ours.float()).abs().mean() > 3

    half = ["--precision=fp16", "--overwrite=true"]
    main(["export", f"--ckpt_path={tmp_path}/last.ckpt", f"--output={tmp_path}/out", *half])
    (file,) = (tmp_path / "out").glob("*.safetensors")
    assert {value.dtype for value in load_file(file).values()} == {torch.float16}


@pytest.mark.parametrize(
    ("config", "words", "init_args"),
    [
        ("mapo_sdxl", ["PaperMaPO", "beta_paper=64"], {"beta_paper": 64.0}),
        (
            "mapo_sdxl",
            ["BalancedDPO"],
            {"beta_dpo": 5000.0, "loss_type": "sigmoid", "label_smoothing": 0.0, "sft_mix": 0.0, "soft": False},
        ),
        ("balanced_dpo_sdxl", ["MaPO"], {"beta_mapo": 0.1, "snr_value": 0.5, "margin_scale": 1000.0}),
        ("quickstart_balanced_dpo", ["SFT"], {}),
    ],
)
def test_objective_is_exchanged_without_traces_of_the_old_one(config, words, init_args, capsys):
    objective, *numbers = words
    overrides = [f"--model.objective={objective}", *(f"--model.objective.{number}" for number in numbers)]
    with pytest.raises(SystemExit):
        main(["fit", f"--config=configs/{config}.yaml", *overrides, "--print_config"])
    found = yaml.safe_load(capsys.readouterr().out)["model"]["objective"]
    assert found == {
        "class_path": f"lit_align.objectives.{objective}",
        **({"init_args": init_args} if init_args else {}),
    }


@pytest.mark.parametrize("name", ["quickstart", "quickstart_balanced_dpo", "balanced_dpo_sdxl_lora"])
def test_a_run_goes_on_and_validates_from_its_own_config(tmp_path, sd15, sd21, capsys, name):
    """The README's commands on a run's folder."""
    main(["fit", *small_options(ROOT / f"configs/{name}.yaml", tmp_path, sd15, sd21)])
    config, checkpoint = next(tmp_path.rglob("config.yaml")), tmp_path / "checkpoints/last.ckpt"
    capsys.readouterr()
    main(["fit", f"--config={config}", f"--ckpt_path={checkpoint}", "--trainer.max_steps=3"])
    assert f"{checkpoint}: checkpoint of step 2\n" in capsys.readouterr().out
    assert torch.load(checkpoint, weights_only=True)["global_step"] == 3
    before = config.read_text()
    with pytest.raises(ValueError, match="began with seed_everything"):
        main(["fit", f"--config={config}", f"--ckpt_path={checkpoint}", "--seed_everything=99"])
    assert config.read_text() == before  # a run that is refused leaves the other one's
    capsys.readouterr()
    main(["validate", f"--config={config}", f"--ckpt_path={checkpoint}"])
    table = capsys.readouterr().out
    assert f"{checkpoint}: checkpoint of step 3\n" in table
    assert "val/accuracy" in table
    assert "val/margin" in table


def test_a_run_that_the_guard_stops_has_failed(tmp_path, sd15, sd21):
    words = small_options(ROOT / "configs/quickstart.yaml", tmp_path, sd15, sd21)
    guard = {"class_path": "DivergenceGuard", "init_args": {"max_rise": 0.01, "window": 1}}
    (tmp_path / "callbacks.yaml").write_text(yaml.safe_dump({"trainer": {"callbacks": [guard]}}))
    with pytest.raises(SystemExit) as end:
        main(["fit", *words, "--data.val_shards=null", "--model.optimizer.init_args.lr=0.5", "--trainer.max_steps=9"])
    assert end.value.code == 1


def test_a_number_that_a_family_keeps_is_said(tmp_path, sd15, sd21, caplog):
    """DiffusionDPO and BalancedDPO share beta_dpo, and parsing keeps it: not silently."""
    folders = [tmp_path / str(number) for number in range(3)]
    for folder in folders:
        folder.mkdir()
    first, second, third = (
        [*small_options(ROOT / "configs/quickstart_balanced_dpo.yaml", folder, sd15, sd21), "--trainer.max_steps=1"]
        for folder in folders
    )
    with caplog.at_level("INFO"):
        main(["fit", *first, "--model.objective=SFT", *callbacks(folders[0])])
        main(["fit", *second, "--model.objective.beta_dpo=300"])
        assert "keeps" not in caplog.text
        main(["fit", *third, "--model.objective=DiffusionDPO", "--data.vote=null"])
    assert "DiffusionDPO keeps beta_dpo 5000.0 of BalancedDPO" in caplog.text


def test_scorers_of_the_loop_are_those_of_the_presets():
    """The overlay names what `lit-align score` takes, and no other checkpoint."""
    presets = yaml.safe_load((ROOT / "lit_align/scoring/presets.yaml").read_text())
    overlay = yaml.safe_load((ROOT / "configs/scorers/balanced_dpo.yaml").read_text())
    vote = yaml.safe_load((ROOT / "configs/balanced_dpo_sdxl.yaml").read_text())["data"]["vote"]
    assert list(overlay) == vote["voters"] == ["hpsv2.1", "clip", "aesthetic", "pickscore"]
    assert all(overlay[name] == presets[name] for name in overlay)


def test_one_config_scores_in_the_loop(tmp_path, sd15, sd21, capsys):
    """The file of scorers as an override, without side files."""
    shards = tmp_path / "shards"
    shards.mkdir()
    shutil.copy(PAIRS / "train/00000.tar", shards)
    words = small_options(ROOT / "configs/quickstart_balanced_dpo.yaml", tmp_path, sd15, sd21)
    data = [f"--data.train_shards={shards}/*.tar", "--data.val_shards=null"]
    with pytest.raises(ValueError, match=r"There are no scores by 'clip'.*or set data\.scorers"):
        main(["fit", *words, *data])
    main(
        ["fit", *words, *data, "--data.scorers=assets/emoji/scorers/scorers.yaml", "--trainer.val_check_interval=null"]
    )
    assert torch.load(tmp_path / "checkpoints/last.ckpt", weights_only=True)["global_step"] == 2


def test_export_of_a_foreign_file(tmp_path):
    torch.save({"state_dict": {}}, tmp_path / "foreign.ckpt")
    with pytest.raises(ValueError, match=r"foreign\.ckpt was not written by lit-align"):
        main(["export", f"--ckpt_path={tmp_path}/foreign.ckpt", f"--output={tmp_path}/out"])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("--seed_everything=false", "seed_everything is False; it must be an integer"),
        ("--model.objective.init_args.beta_dpo=1", "beta_dpo"),
        ("--trainer.max_stpes=3", "max_stpes"),
        ("--data.batch_size=0", "data.batch_size is 0"),
        ("--data.train_shards=nothing/*.tar", "there is no file 'nothing/*.tar'"),
    ],
)
def test_bad_input_is_named(override, message, capsys, tmp_path):
    with pytest.raises((SystemExit, ValueError, FileNotFoundError)) as error:
        main(["fit", "--config=configs/quickstart.yaml", f"--trainer.logger.init_args.save_dir={tmp_path}", override])
    assert message in capsys.readouterr().err + str(error.value)


def test_a_batch_script_without_srun_does_not_wait_for_tasks_that_nobody_starts(monkeypatch, tmp_path):
    of_the_script = {"NTASKS": "2", "NTASKS_PER_NODE": "2", "PROCID": "0", "LOCALID": "0", "NODEID": "0"}
    for name, value in (of_the_script | {"JOB_NAME": "align", "JOB_ID": "7"}).items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    for name in ("STEP_NUM_TASKS", "STEP_ID", "PTY_PORT"):
        monkeypatch.delenv(f"SLURM_{name}", raising=False)
    words = [f"--config={ROOT}/configs/quickstart.yaml", f"--trainer.default_root_dir={tmp_path}"]
    with pytest.raises(UserRuntimeError, match=r"SLURM_NTASKS is 2, .*Put srun before the command"):
        main(["fit", *words, "--trainer.accelerator=cpu", "--trainer.devices=2"])


def test_missing_extra_is_named(capsys):
    with pytest.raises(SystemExit):
        Parser().error("No module named 'bitsandbytes'")
    assert capsys.readouterr().err.rstrip().endswith("lit-align's extra 8bit: pip install -e '.[8bit]' in its checkout")


def run(*words):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-m", "lit_align", *map(str, words)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=300,
        cwd=ROOT,
    )


def test_two_processes_train_together(tmp_path, sd15, sd21):
    """DDP on two CPU processes with workers: the run ends, both ranks share the grid, the banner counts both."""
    words = small_options(ROOT / "configs/quickstart.yaml", tmp_path, sd15, sd21)
    two = ["--trainer.devices=2", "--trainer.strategy=ddp", "--data.num_workers=1"]
    result = run("fit", *words, *two)
    assert result.returncode == 0, result.stderr[-2000:]
    assert "4 pairs a step = 2 a device x 1 accumulated x 2 devices" in result.stderr + result.stdout
    assert "MaPO (released form)" in result.stderr + result.stdout
    grid = Image.open(next(tmp_path.rglob("step-0000002.png")))
    assert len(grid.crop((90, 16, 90 + 128, 144)).getcolors(maxcolors=128 * 128)) > 5
    assert (tmp_path / "checkpoints/last.ckpt").exists()


def test_help_names_all_commands(capsys):
    result = run("--help")
    assert result.returncode == 0
    for command in COMMANDS:
        assert f"\n  {command} " in result.stdout
    with pytest.raises(SystemExit) as exit_:
        main(["export", "--help"])
    assert exit_.value.code == 0
    assert "--output" in capsys.readouterr().out
