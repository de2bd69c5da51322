"""`lit-align predict`: images of any model, each drawn once, equal to the images of `lit-align test`."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from threading import RLock

import pytest
import torch
from torch.distributed.checkpoint import save
from tqdm import tqdm

from lit_align.backbones import StableDiffusion, StableDiffusionXL, sampling
from lit_align.backbones.loading.denoisers import load_denoiser
from lit_align.cli import main
from lit_align.commands.evaluate.predict import Predict
from lit_align.commands.shared import process_group as place
from lit_align.data.decoder import decode_pixels
from lit_align.evaluation.prompts import prompt_seed
from tests.support.exports import adapter, darker
from tests.support.paths import PIPELINE, ROOT

NAMES = ["anchor", "bacon", "fox"]


def draw(folder, names=NAMES, output="out", **options):
    (folder / "prompts.txt").write_text("\n".join(names) + "\n")
    options = {"model": str(PIPELINE), "steps": 2, "accelerator": "cpu", "devices": 1, **options}
    Predict(prompts=str(folder / "prompts.txt"), output=folder / output, **options).run()
    return folder / output


def table(folder):
    return [json.loads(line) for line in (folder / "images.jsonl").read_text().splitlines()]


def files(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def pixels(path):
    return torch.from_numpy(decode_pixels(path.read_bytes())).permute(2, 0, 1)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return draw(tmp_path_factory.mktemp("whole"), images_per_prompt=2)


def test_images_are_what_the_table_says(whole):
    rows = table(whole)
    assert [(row["number"], row["prompt"], row["file"]) for row in rows] == [
        (number, name, f"0000{number}-{i}.png") for number, name in enumerate(NAMES) for i in (0, 1)
    ]
    assert [row["seed"] for row in rows[:2]] == [prompt_seed("anchor", 0), prompt_seed("anchor", 1)]
    backbone = StableDiffusionXL(str(PIPELINE))
    for row in rows[::3]:
        (drawn,) = sampling.generate(backbone, [row["prompt"]], [row["seed"]], 32, 32, 2, 5.0)
        assert torch.equal(pixels(whole / row["file"]), drawn)
    assert sorted(files(whole)) == sorted(["predict.json", "images.jsonl", *(row["file"] for row in rows)])


@pytest.mark.parametrize("batch_size", [1, 8])
def test_batch_size_does_not_matter(whole, tmp_path, batch_size):
    assert files(draw(tmp_path, images_per_prompt=2, batch_size=batch_size)) == files(whole)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)], ids=["first ends last", "second ends last"])
def test_two_processes_draw_what_one_does(whole, tmp_path, monkeypatch, order, capsys):
    monkeypatch.setattr(place, "LOOKS", 0)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "0")
    for rank in order[::-1]:
        assert not (tmp_path / "out/images.jsonl").exists()
        monkeypatch.setenv("RANK", str(rank))
        draw(tmp_path, images_per_prompt=2)
    said = capsys.readouterr().out
    assert "3 images of other processes are still to come" in said
    assert "If none is running, run the same command again." in said
    assert files(tmp_path / "out") == files(whole)


@pytest.mark.slow
def test_devices_draw_what_one_process_does(whole, tmp_path):
    """The command starts the other processes and ends after them."""
    (tmp_path / "prompts.txt").write_text("\n".join(NAMES) + "\n")
    words = ["--prompts=prompts.txt", f"--model={PIPELINE}", "--steps=2", "--images_per_prompt=2", "--output=out"]
    command = [sys.executable, "-m", "lit_align", "predict", "--accelerator=cpu", "--devices=2", *words]
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    ended = subprocess.run(
        command, env=environment | {"PYTHONPATH": str(ROOT)}, cwd=tmp_path, capture_output=True, text=True, timeout=400
    )
    assert ended.returncode == 0, ended.stderr[-2000:]
    assert files(tmp_path / "out") == files(whole)


def draw_to_be_killed(*arguments, **options):
    """Draw with a new tqdm lock: the default one is shared with the parent and would stay locked."""
    tqdm.set_lock(RLock())
    draw(*arguments, **options)


def test_a_killed_run_resumes(whole, tmp_path, capsys):
    """Existing images stay; damaged ones are drawn again."""
    options = {"images_per_prompt": 2}
    process = multiprocessing.get_context("fork").Process(target=draw_to_be_killed, args=(tmp_path,), kwargs=options)
    process.start()
    output = tmp_path / "out"
    until = time.monotonic() + 60
    while not (output / "00000-1.png").exists() and time.monotonic() < until:
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    kept = (output / "00000-1.png").stat().st_mtime_ns
    (output / "00000-0.png").write_bytes((output / "00000-0.png").read_bytes()[:-20])
    draw(tmp_path, **options)
    assert (output / "00000-1.png").stat().st_mtime_ns == kept
    assert {name: data for name, data in files(output).items() if not name.startswith(".")} == files(whole)
    capsys.readouterr()
    draw(tmp_path, **options)
    assert "drew 0 images, 6 were done before" in capsys.readouterr().out


@pytest.mark.parametrize("export", [darker, adapter])
def test_exports(whole, tmp_path, export):
    folder = export(tmp_path / "export")
    output = draw(tmp_path, NAMES[:1], model=str(folder), base=str(PIPELINE))
    backbone = StableDiffusionXL(str(PIPELINE))
    backbone.denoiser = load_denoiser(backbone, str(folder))
    (drawn,) = sampling.generate(backbone, NAMES[:1], [prompt_seed(NAMES[0], 0)], 32, 32, 2, 5.0)
    assert torch.equal(pixels(output / "00000-0.png"), drawn)
    assert (drawn.float() - pixels(whole / "00000-0.png").float()).abs().mean() > 2


@pytest.mark.parametrize("slash", ["", "/"])
def test_a_checkpoint_in_parts(tmp_path, slash):
    """A checkpoint folder of sharded training draws with the base that it names."""
    backbone = StableDiffusionXL(str(PIPELINE))
    backbone.denoiser.conv_out.bias.data.add_(0.3)
    weights = {f"backbone.denoiser.{name}": value for name, value in backbone.denoiser.state_dict().items()}
    folder = tmp_path / "step=4.ckpt"
    save({"state_dict": weights}, checkpoint_id=folder, no_dist=True)
    torch.save({"lit_align": backbone.export_info(), "global_step": 4}, folder / "meta.pt")
    output = draw(tmp_path, NAMES[:1], model=f"{folder}{slash}")
    (drawn,) = sampling.generate(backbone, NAMES[:1], [prompt_seed(NAMES[0], 0)], 32, 32, 2, 5.0)
    assert torch.equal(pixels(output / "00000-0.png"), drawn)


def test_another_kind_of_pipeline(sd15, tmp_path):
    """Another kind of pipeline has another default guidance scale."""
    output = draw(tmp_path, NAMES[:1], model=str(sd15))
    (drawn,) = sampling.generate(StableDiffusion(str(sd15)), NAMES[:1], [prompt_seed(NAMES[0], 0)], 32, 32, 2, 7.5)
    assert torch.equal(pixels(output / "00000-0.png"), drawn)
    assert json.loads((output / "predict.json").read_text())["drawing"]["guidance_scale"] == 7.5


def test_from_the_command_line(tmp_path):
    """Options come from a config too."""
    (tmp_path / "a.csv").write_text("prompt,caption\nno,fox\nno,fox\nno,bell\n")
    config = f"prompts: {tmp_path}/a.csv\nmodel: {PIPELINE}\nsteps: 1\noutput: {tmp_path}/out\n"
    (tmp_path / "config.yaml").write_text(config)
    options = ["--accelerator=cpu", "--devices=1", "--seed=3", "--prompt_column=caption"]
    main(["predict", f"--config={tmp_path}/config.yaml", *options])
    rows = table(tmp_path / "out")
    assert [row["prompt"] for row in rows] == ["fox", "bell"]
    assert rows[0] == {"number": 0, "prompt": "fox", "seed": prompt_seed("fox", 3), "file": "00000-0.png"}


def test_a_folder_that_was_begun_otherwise_is_refused(tmp_path):
    output = draw(tmp_path, NAMES[:1], steps=1)
    before = files(output)
    with pytest.raises(ValueError, match=r"seed was 0, is 1; drawing\.steps was 1, is 2"):
        draw(tmp_path, NAMES[:1], seed=1)
    (output / "predict.json").unlink()
    with pytest.raises(ValueError, match=r"holds 00000-0\.png, but no predict\.json"):
        draw(tmp_path, NAMES[:1], steps=1)
    assert files(output) == {name: data for name, data in before.items() if name != "predict.json"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": "nowhere"}, "'nowhere' is neither a checkpoint of lit-align fit"),
        ({"names": [""]}, "there is no prompt"),
        ({"images_per_prompt": 0}, "images_per_prompt is 0"),
        ({"width": 30}, "width is 30; it must be a multiple of 8"),
    ],
)
def test_bad_options_are_named_and_leave_nothing(tmp_path, options, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        draw(tmp_path, **options)
    assert not (tmp_path / "out").exists()


def test_an_export_needs_its_base(tmp_path):
    with pytest.raises(ValueError, match=r"no checkpoint names it\. Say --base"):
        draw(tmp_path, model=str(darker(tmp_path / "dark")))
