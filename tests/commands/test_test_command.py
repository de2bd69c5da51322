"""`lit-align test`: equal results for any batch size and number of processes."""

import json
import multiprocessing
import os
import subprocess
import sys
from contextlib import suppress

import pytest
import torch

from lit_align.backbones import StableDiffusionXL, sampling
from lit_align.backbones.loading.denoisers import load_denoiser
from lit_align.commands.evaluate import comparison
from lit_align.commands.shared import image_files
from lit_align.commands.shared import process_group as place_module
from lit_align.data.decoder import decode_pixels
from lit_align.evaluation.prompts import prompt_seed
from lit_align.evaluation.win_rates import compare
from lit_align.scoring import load_scorers
from tests.support.paths import PIPELINE, ROOT
from tests.support.win_rate_tests import (
    NAMES,
    SCORERS,
    TOLERANCES,
    read_images,
    read_results,
    run_test,
    without_options,
    write_prompts,
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, dark):
    """A folder with results whose images were drawn one by one."""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        run_test(folder, dark, steps=6, tolerances=TOLERANCES, batch_size=1)
    return folder


def test_results_are_what_sampler_and_scorers_say(whole, dark):
    found = read_results(whole / "out")
    backbone = StableDiffusionXL(str(PIPELINE))
    scorers = load_scorers(SCORERS, ROOT / "assets/emoji/scorers/scorers.yaml")
    denoisers = {"base": backbone.denoiser, "dark": load_denoiser(backbone, dark)}
    assert list(found["models"]) == ["base", "dark"]
    assert found["models"]["base"] | {"fingerprint": ""} == {"repo": str(PIPELINE), "weights": None, "fingerprint": ""}
    assert found["models"]["dark"]["weights"] == dark
    assert found["prompts"] == [{"prompt": name, "seed": prompt_seed(name, 0)} for name in NAMES]
    assert found["sampling"] == {
        "sampler": "euler",
        "steps": 6,
        "guidance_scale": 5.0,
        "height": 32,
        "width": 32,
        "precision": "fp32",
        "seed": 0,
    }
    for model, denoiser in denoisers.items():
        backbone.denoiser = denoiser
        for number in (0, 5):
            seed = prompt_seed(NAMES[number], 0)
            (drawn,) = sampling.generate(backbone, [NAMES[number]], [seed], 32, 32, 6, 5.0)
            stored = decode_pixels((whole / f"out/images/{model}/{number:05d}.png").read_bytes())
            assert torch.equal(drawn, torch.from_numpy(stored).permute(2, 0, 1))
            for name, scorer in scorers.items():
                assert found["scores"][name][model][number] == scorer.score([drawn], [NAMES[number]]).item()
    assert len(read_images(whole / "out")) == 2 * len(NAMES)
    tensors = {
        model: {name: torch.tensor(found["scores"][name][model], dtype=torch.float64) for name in SCORERS}
        for model in denoisers
    }
    wanted = compare(tensors["dark"], tensors["base"], TOLERANCES)
    (found_one,) = found["comparisons"]
    assert (found_one["model"], found_one["against"], found_one["macro"]) == ("dark", "base", wanted.macro)
    for name, outcome in found_one["scorers"].items():
        assert outcome["wins"] + outcome["ties"] + outcome["losses"] == len(NAMES)
        assert outcome["win_rate"] == wanted.scorers[name].win_rate
        assert outcome["interval"] == list(wanted.scorers[name].interval)
        assert outcome["sign_test"] == wanted.scorers[name].sign_test
    assert found["scorers"]["clip"] == {"fingerprint": scorers["clip"].fingerprint(), "tie_tolerance": 0.01}
    assert found["made_with"]["torch"] == torch.__version__
    assert found["made_with"]["options"]["scorers"] == SCORERS


def test_batch_size_does_not_matter(whole, tmp_path, dark):
    """Batches of 8 and of 1 give equal images and scores, to the last bit."""
    again = run_test(tmp_path, dark, steps=6, tolerances=TOLERANCES, batch_size=8)
    assert without_options(again) == without_options(read_results(whole / "out"))
    assert read_images(tmp_path / "out") == read_images(whole / "out")


def test_larger_batches_find_nearly_equal_results(whole, tmp_path, dark, monkeypatch):
    """On a GPU images and scores are computed in batches; here in batches of 3, of 8 images."""
    for module in (comparison, image_files):
        monkeypatch.setattr(module, "at_a_time", lambda *_: 3)
    again, single = run_test(tmp_path, dark, steps=6, tolerances=TOLERANCES), read_results(whole / "out")
    drawn, alone = read_images(tmp_path / "out"), read_images(whole / "out")
    assert drawn.keys() == alone.keys()
    for name, data in drawn.items():
        difference = decode_pixels(data).astype(int) - decode_pixels(alone[name])
        assert abs(difference).max() <= 1
    for name in SCORERS:
        for model, values in again["scores"][name].items():
            for number, (value, wanted) in enumerate(zip(values, single["scores"][name][model], strict=True)):
                key = f"images/{model}/{number:05d}.png"
                near = 1e-4 if drawn[key] == alone[key] else 1e-3  # a pixel that differs by 1 changes a score more
                assert value == pytest.approx(wanted, rel=near, abs=near)


def command(folder, model, **options):
    """Run the command line without OMP_NUM_THREADS, and return the ended process."""
    words = [f"--{name}={value}" for name, value in options.items()]
    words += [f"--models={{dark: {model}}}", f"--base={PIPELINE}", f"--prompts={write_prompts(folder)}"]
    words += [f"--scorers={','.join(SCORERS)}", f"--presets={ROOT}/assets/emoji/scorers/scorers.yaml", "--steps=6"]
    words += [f"--tolerances={json.dumps(TOLERANCES)}", f"--output={folder}/out", f"--cache={folder}/cache"]
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    command = [sys.executable, "-m", "lit_align", "test", "--accelerator=cpu", *words]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400)


@pytest.mark.parametrize("devices", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_devices_find_equal_results_to_the_last_bit(whole, tmp_path, dark, devices):
    """The command starts the other processes, and ends after them, when the results are written."""
    ended = command(tmp_path, dark, devices=devices)
    assert ended.returncode == 0, ended.stderr[-2000:]
    assert ended.stdout.count("dark against base, 8 prompts") == 1
    assert without_options(read_results(tmp_path / "out")) == without_options(read_results(whole / "out"))
    assert read_images(tmp_path / "out") == read_images(whole / "out")
    assert read_results(tmp_path / "out")["made_with"]["device"] == "CPU, threads: 1"


def share_of(rank, *arguments, **options):
    """Run a test as one of two processes that torchrun has started."""
    os.environ |= {"TORCHELASTIC_RUN_ID": "1", "WORLD_SIZE": "2", "LOCAL_RANK": str(rank), "RANK": str(rank)}
    with suppress(FileNotFoundError):  # the process that ends first finds no results
        run_test(*arguments, **options)


def test_two_processes_find_what_one_does(whole, tmp_path, dark, capfd):
    """Two concurrent processes find what one does, and one prints the table; also when there is nothing left to do."""
    for _ in range(2):
        fork = multiprocessing.get_context("fork").Process
        arguments = {"steps": 6, "tolerances": TOLERANCES}
        both = [fork(target=share_of, args=(rank, tmp_path, dark), kwargs=arguments) for rank in (0, 1)]
        for process in both:
            process.start()
        for process in both:
            process.join()
        assert [process.exitcode for process in both] == [0, 0]
        assert capfd.readouterr().out.count("dark against base, 8 prompts") == 1
        assert without_options(read_results(tmp_path / "out")) == without_options(read_results(whole / "out"))
        assert read_images(tmp_path / "out") == read_images(whole / "out")


@pytest.mark.parametrize("order", [(0, 1), (1, 0)], ids=["first ends last", "second ends last"])
def test_the_last_process_writes(tmp_path, dark, monkeypatch, order, capsys):
    """Two processes that run one after the other, without waiting."""
    monkeypatch.setattr(place_module, "LOOKS", 0)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "0")
    share = {"names": NAMES[:3], "scorers": "colour", "steps": 1}
    monkeypatch.setenv("RANK", str(order[1]))
    with pytest.raises(FileNotFoundError):
        run_test(tmp_path, dark, **share)
    said = capsys.readouterr().out
    assert "other processes are still at work; the last one writes" in said
    assert "If none is running, run the same command again." in said
    assert "against" not in said
    assert not (tmp_path / "out").exists()
    monkeypatch.setenv("RANK", str(order[0]))
    assert [row["prompt"] for row in run_test(tmp_path, dark, **share)["prompts"]] == NAMES[:3]
    assert capsys.readouterr().out.count("dark against base, 3 prompts") == 1


def test_results_of_other_options_are_refused(whole, tmp_path, dark):
    before = (whole / "out/results.json").read_bytes()
    with pytest.raises(ValueError, match=r"was begun with other values: steps was 6, is 2"):
        run_test(whole, dark, tolerances=TOLERANCES)
    with pytest.raises(ValueError, match=r"prompts' digest was"):
        run_test(whole, dark, NAMES[:2], tolerances=TOLERANCES, steps=6)
    write_prompts(whole)
    assert (whole / "out/results.json").read_bytes() == before
