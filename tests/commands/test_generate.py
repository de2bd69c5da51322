"""`lit-align generate`: what is drawn depends on the prompt and the seed alone, and says truly how it was made."""

import io
import json
import os
import signal
import time

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from PIL import Image

from lit_align.backbones import StableDiffusion, StableDiffusionXL, sampling
from lit_align.backbones.loading.denoisers import backbone_class, load_denoiser
from lit_align.cli import main
from lit_align.commands.generate.command import Generate
from lit_align.commands.generate.recipes import PRESETS, choose_prefixes, pair_seeds
from lit_align.data.shards.index import read_index, read_rows
from lit_align.data.shards.layout import parse_sample, read_samples
from lit_align.evaluation.prompts import read_prompts
from lit_align.scoring import Colourfulness
from tests.support.exports import adapter, darker
from tests.support.paths import PIPELINE, ROOT
from tests.support.pipelines import small_sdxl
from tests.support.processes import fork

NAMES = ["anchor", "bacon", "fox", "tulip", "bell"]
SCORERS = ROOT / "assets/emoji/scorers/scorers.yaml"


def write_prompts(folder, names, name="prompts.txt"):
    path = folder / name
    path.write_text("\n".join(names) + "\n")
    return str(path)


def make(folder, names=NAMES, output="out", **options):
    """Two guidance scales from the same noise, unless told otherwise."""
    sides = {"chosen_guidance_scale": 5.0, "rejected_guidance_scale": 1.0}
    options = {**sides, "repo": str(PIPELINE), "steps": 2, "pairs_per_shard": 2, "accelerator": "cpu", **options}
    Generate(prompts=write_prompts(folder, names), output=folder / output, **options).run()
    return folder / output


def pairs(output):
    """Of all shards that the index names: pair and what is written of it, by key."""
    samples = [sample for shard, _ in read_index(str(output / "index.json")) for sample in read_samples(shard)]
    return {sample.key: (parse_sample(sample), json.loads(sample.fields["json"])) for sample in samples}


def pixels(data):
    return torch.from_numpy(np.array(Image.open(io.BytesIO(data)).convert("RGB"))).permute(2, 0, 1)


def sides(pair, more):
    """The encoded image of each side, by its name."""
    return {more["image_0"]["side"]: pair.image_0, more["image_1"]["side"]: pair.image_1}


def files(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """All prompts in one go, drawn two at a time."""
    return make(tmp_path_factory.mktemp("whole"))


def test_pairs_are_what_the_sampler_draws(whole):
    found = pairs(whole)
    assert list(found) == [f"{number:08d}-0" for number in range(len(NAMES))]
    backbone = StableDiffusionXL(str(PIPELINE))
    first = set()
    for name, (pair, more) in zip(NAMES, found.values(), strict=True):
        assert pair.prompt == more["image_0"]["prompt"] == more["image_1"]["prompt"] == name
        preferred = "image_0" if pair.label_0 == 1 else "image_1"
        assert more[preferred]["side"] == "chosen"
        assert {more[f"image_{i}"]["side"]: more[f"image_{i}"]["guidance_scale"] for i in (0, 1)} == {
            "chosen": 5.0,
            "rejected": 1.0,
        }
        assert more["label_by"] == "side"
        for place, data in enumerate((pair.image_0, pair.image_1)):
            about = more[f"image_{place}"]
            image = sampling.generate(backbone, [name], [about["seed"]], 32, 32, 2, about["guidance_scale"])[0]
            assert (image.int() - pixels(data).int()).abs().max() <= 1
        assert more["image_0"]["seed"] != more["image_1"]["seed"]
        first.add(pair.label_0)
    assert first == {0.0, 1.0}  # the place says nothing


def test_index_says_what_is_there(whole):
    index = json.loads((whole / "index.json").read_text())
    assert index["totals"] | {"bytes": 0} == {"bytes": 0, "samples": 5, "pairs": 5, "ties": 0, "broken": 0}
    assert [(shard["name"], shard["samples"]) for shard in index["shards"]] == [
        ("00000.tar", 2),
        ("00001.tar", 2),
        ("00002.tar", 1),
    ]
    prompts = [read_rows(rows)["prompt"].to_pylist() for _, rows in read_index(str(whole / "index.json"))]
    assert prompts == [NAMES[:2], NAMES[2:4], NAMES[4:]]
    assert sorted(files(whole)) == sorted(
        ["generate.json", "index.json", *(f"0000{i}.{kind}" for i in range(3) for kind in ("tar", "index.parquet"))]
    )


@pytest.mark.parametrize(("batch_size", "pairs_per_shard"), [(1, 2), (4, 5)])
def test_batch_size_does_not_matter(whole, tmp_path, batch_size, pairs_per_shard):
    """Rounding apart: one grey level at most."""
    again = make(tmp_path, batch_size=batch_size, pairs_per_shard=pairs_per_shard)
    for (old, _), (new, _) in zip(pairs(whole).values(), pairs(again).values(), strict=True):
        assert (old.key, old.label_0) == (new.key, new.label_0)
        for one, other in ((old.image_0, new.image_0), (old.image_1, new.image_1)):
            assert (pixels(one).int() - pixels(other).int()).abs().max() <= 1


def test_the_file_around_a_prompt_does_not_matter(whole, tmp_path):
    known = {pair.prompt: (pair, more) for pair, more in pairs(whole).values()}
    for pair, more in pairs(make(tmp_path, ["fox", "fox", "", "anchor"])).values():
        old, about = known[pair.prompt]
        assert (old.label_0, about) == (pair.label_0, more)
        assert (pixels(old.image_0).int() - pixels(pair.image_0).int()).abs().max() <= 1


@pytest.mark.parametrize("order", [(0, 1), (1, 0)], ids=["first ends last", "second ends last"])
def test_two_processes_write_what_one_does(whole, tmp_path, monkeypatch, order, capsys):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "0")
    for rank in order[::-1]:
        assert not (tmp_path / "out/index.json").exists()
        monkeypatch.setenv("RANK", str(rank))
        make(tmp_path)
    assert "shards of other processes are still to come" in capsys.readouterr().out
    assert files(tmp_path / "out") == files(whole)


def test_a_killed_run_goes_on(whole, tmp_path, capsys):
    """Killed in the middle of its second shard: what it left over is cleared away. Then shards are lost or changed."""
    process = fork(lambda: make(tmp_path))
    output = tmp_path / "out"
    until = time.monotonic() + 60
    while not list(output.glob(".00001.tar.*.part")) and time.monotonic() < until:
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert [path.name for path in output.glob("*.tar")] == ["00000.tar"]
    assert len(list(output.glob(".*.part"))) == 1
    (output / "00000.index.parquet").unlink()  # as if killed before them
    written = (output / "00000.tar").stat().st_mtime_ns
    make(tmp_path)
    assert files(output) == files(whole)
    assert (output / "00000.tar").stat().st_mtime_ns == written
    capsys.readouterr()
    make(tmp_path)
    assert "drew 0 shards, 3 were done before" in capsys.readouterr().out
    (output / "00001.tar").unlink()
    (output / "00002.tar").write_bytes(b"")
    make(tmp_path)
    assert files(output) == files(whole)


def test_seed_0_is_a_seed(whole, tmp_path):
    zero, one = pairs(whole), pairs(make(tmp_path, seed=1, names=NAMES[:2]))
    for key in one:
        assert not torch.equal(pixels(zero[key][0].image_0), pixels(one[key][0].image_0))
        assert one[key][1]["run_seed"] == 1
    assert zero[key][1]["run_seed"] == 0


def test_draws():
    assert pair_seeds("fox", 0, 0, False) == pair_seeds("fox", 0, 0, False)
    drawn = [pair_seeds(name, seed, pair, False) for name in NAMES for seed in (0, 1) for pair in (0, 1)]
    assert len({number for one in drawn for number in one.seeds}) == 2 * len(drawn)
    assert all(0 <= number < 2**32 for one in drawn for number in one.seeds)
    same = pair_seeds("fox", 0, 0, True)
    assert same.seeds[0] == same.seeds[1] == pair_seeds("fox", 0, 0, False).seeds[0]
    first = [pair_seeds(str(number), 0, 0, False).rejected_first for number in range(2000)]
    assert abs(np.mean(first) - 0.5) < 0.05


def test_ranked_by_a_scorer(tmp_path, capsys):
    """Two seeds; the more colourful image is preferred, by what is stored."""
    alike = {"chosen_guidance_scale": None, "rejected_guidance_scale": None, "rank_by": "colour", "presets": SCORERS}
    found = pairs(make(tmp_path, NAMES[:2], pairs_per_prompt=2, image_format="jpeg", quality=80, **alike))
    assert list(found) == [f"{number:08d}-{pair}" for number in range(2) for pair in (0, 1)]
    assert "0 pairs are ties" in capsys.readouterr().out
    wins = set()
    for pair, more in found.values():
        images = [pair.image_0, pair.image_1]
        assert all(data.startswith(b"\xff\xd8") for data in images)
        scores = Colourfulness().score([pixels(data) for data in images], [pair.prompt] * 2).tolist()
        assert pair.label_0 == float(scores[0] > scores[1])
        assert [more[f"image_{i}"]["score"] for i in (0, 1)] == scores
        assert more["label_by"] == "colour"
        assert "side" not in more["image_0"]
        assert [more[f"image_{i}"]["guidance_scale"] for i in (0, 1)] == [5.0, 5.0]  # SDXL's own
        wins.add(pair.label_0)
    assert wins == {0.0, 1.0}
    again = pairs(make(tmp_path, NAMES[:1], "one", image_format="jpeg", quality=80, **alike))
    (one, about), (first, about_first) = again["00000000-0"], found["00000000-0"]
    assert [about[f"image_{i}"]["seed"] for i in (0, 1)] == [about_first[f"image_{i}"]["seed"] for i in (0, 1)]
    for image, before in ((one.image_0, first.image_0), (one.image_1, first.image_1)):
        change = (pixels(image).int() - pixels(before).int()).abs()  # a batch of another size rounds otherwise
        assert change.float().mean() < 1


def test_equal_scores_are_a_tie(tmp_path, capsys):
    """Spaces in front make no other prompt, so both images are the same."""
    options = {"chosen_prefix": " ", "same_noise": True, "rank_by": "colour", "presets": SCORERS}
    equal = {"chosen_guidance_scale": 2.0, "rejected_guidance_scale": 2.0}
    output = make(tmp_path, NAMES[:2], **options, **equal)
    assert [pair.label_0 for pair, _ in pairs(output).values()] == [0.5, 0.5]
    assert json.loads((output / "index.json").read_text())["totals"]["ties"] == 2
    assert "2 pairs are ties" in capsys.readouterr().out


def test_a_preset_s_prefix_is_drawn_and_not_written(tmp_path):
    """From the command line, where an empty prefix is one too."""
    words = [f"--prompts={write_prompts(tmp_path, ['fox'])}", f"--repo={PIPELINE}", "--steps=2", "--same_noise"]
    words += ["--accelerator=cpu", "--preset=pick-style-pixel-art", "--image_format=webp"]
    main(["generate", *words, f"--output={tmp_path}/preset"])
    ((pair, more),) = pairs(tmp_path / "preset").values()
    assert pair.prompt == "fox"
    about = {more[f"image_{i}"]["side"]: more[f"image_{i}"] for i in (0, 1)}
    assert about["chosen"]["prompt"] == "Pixel art style image. fox"
    assert about["rejected"]["prompt"] == "fox"
    assert about["chosen"]["seed"] == about["rejected"]["seed"]
    assert pair.image_0[8:12] == b"WEBP"

    main(["generate", *words, "--chosen_prefix", "", "--rejected_prefix", "A photo.", f"--output={tmp_path}/own"])
    ((_, more),) = pairs(tmp_path / "own").values()
    prompts = {more[f"image_{i}"]["side"]: more[f"image_{i}"]["prompt"] for i in (0, 1)}
    assert prompts == {"chosen": "fox", "rejected": "A photo. fox"}


def test_presets():
    assert list(PRESETS) == ["pick-style-cartoon", "pick-style-pixel-art", "pick-safety"]
    assert choose_prefixes("pick-style-cartoon", None, None) == ("Disney style animated image.", "")
    assert choose_prefixes("pick-style-pixel-art", None, "Realistic 8k image.") == (
        "Pixel art style image.",
        "Realistic 8k image.",
    )
    assert choose_prefixes("pick-style-cartoon", "", None) == ("", "")
    assert choose_prefixes("pick-safety", None, "Scary.") == ("", "Scary.")
    assert choose_prefixes(None, None, None) == ("", "")
    with pytest.raises(
        ValueError, match=r"prefix of its rejected images is unknown here\. Say it with --rejected_prefix"
    ):
        choose_prefixes("pick-safety", None, None)


def test_another_plan_is_refused(tmp_path):
    output = make(tmp_path, NAMES[:1])
    before = files(output)
    with pytest.raises(
        ValueError, match=r"seed was 0, is 1; drawing\.steps was 2, is 3\. Resume with .*choose another folder"
    ):
        make(tmp_path, NAMES[:1], steps=3, seed=1)
    with pytest.raises(ValueError, match=r"prompts\.count was 1, is 3"):
        make(tmp_path, NAMES[:3])
    (output / "generate.json").unlink()
    with pytest.raises(ValueError, match=r"no generate\.json"):
        make(tmp_path, NAMES[:1])
    assert files(output) == {name: data for name, data in before.items() if name != "generate.json"}


def by_diffusers(folder, name, seed):
    """Its image by a pipeline with what is in `folder`, as the export's message says to load it."""
    if (folder / "config.json").exists():
        unet = UNet2DConditionModel.from_pretrained(folder)
        pipeline = StableDiffusionXLPipeline.from_pretrained(PIPELINE, unet=unet)
    else:
        pipeline = StableDiffusionXLPipeline.from_pretrained(PIPELINE)
        pipeline.load_lora_weights(folder)
    noise = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(seed))
    image = pipeline(name, latents=noise, num_inference_steps=2, height=32, width=32, output_type="np").images[0]
    return torch.from_numpy(image).permute(2, 0, 1) * 255


@pytest.mark.parametrize("export", [darker, adapter])
def test_a_trained_unet_against_the_base(whole, tmp_path, export):
    folder = export(tmp_path / "export")
    same = {"chosen_guidance_scale": 5.0, "rejected_guidance_scale": 5.0}
    found = pairs(make(tmp_path, NAMES[:2], chosen_unet=str(folder), same_noise=True, **same))
    base = pairs(whole)
    for key, (pair, more) in found.items():
        images = {side: pixels(data).float() for side, data in sides(pair, more).items()}
        assert more["image_0"]["seed"] == more["image_1"]["seed"]
        theirs = by_diffusers(folder, pair.prompt, more["image_0"]["seed"])
        assert (images["chosen"] - theirs).abs().max() <= 1
        assert (images["chosen"] - images["rejected"]).abs().mean() > 2
        untouched = pixels(sides(*base[key])["chosen"]).float()  # the base's image from this noise
        assert (images["rejected"] - untouched).abs().max() <= 1
        assert {more[f"image_{i}"]["unet"] for i in (0, 1)} == {str(folder), None}


def test_options_of_one_side_reach_that_side(sd15, tmp_path):
    """`--rejected_unet` and `--chosen_repo`, which no other test gives."""
    folder, same = darker(tmp_path / "export"), {"chosen_guidance_scale": 5.0, "rejected_guidance_scale": 5.0}
    ((pair, more),) = pairs(
        make(tmp_path, NAMES[:1], "unet", rejected_unet=str(folder), same_noise=True, **same)
    ).values()
    images = {side: pixels(data).float() for side, data in sides(pair, more).items()}
    assert {more[f"image_{i}"]["side"]: more[f"image_{i}"]["unet"] for i in (0, 1)} == {
        "chosen": None,
        "rejected": str(folder),
    }
    assert (images["rejected"] - by_diffusers(folder, pair.prompt, more["image_0"]["seed"])).abs().max() <= 1
    assert (images["chosen"] - images["rejected"]).abs().mean() > 2
    output = make(tmp_path, NAMES[:1], "repo", repo=str(small_sdxl()), chosen_repo=str(sd15), **same)
    ((_, more),) = pairs(output).values()
    assert {more[f"image_{i}"]["side"]: more[f"image_{i}"]["repo"] for i in (0, 1)} == {
        "chosen": str(sd15),
        "rejected": str(small_sdxl()),
    }


def test_a_retrained_unet_under_the_old_name_is_another_plan(tmp_path):
    folder = darker(tmp_path / "export")
    make(tmp_path, NAMES[:1], chosen_unet=str(folder))
    unet = UNet2DConditionModel.from_pretrained(folder)
    with torch.no_grad():
        unet.conv_in.weight.mul_(1.001)
    unet.save_pretrained(folder)
    with pytest.raises(ValueError, match=r"weights\.chosen was"):
        make(tmp_path, NAMES[:1], chosen_unet=str(folder))


def test_stable_diffusion_and_half_precision(sd15, tmp_path):
    """Another kind of pipeline on one side; the size is the model's own, guidance the pipelines'."""
    repos = {"repo": str(small_sdxl()), "rejected_repo": str(sd15)}
    none = {"chosen_guidance_scale": None, "rejected_guidance_scale": None}
    output = make(tmp_path, NAMES[:1], precision="bf16", **repos, **none)
    ((pair, more),) = pairs(output).values()
    scales = {more[f"image_{i}"]["repo"]: more[f"image_{i}"]["guidance_scale"] for i in (0, 1)}
    assert scales == {repos["repo"]: 5.0, str(sd15): 7.5}
    assert pixels(pair.image_0).shape == (3, 32, 32)
    full = pairs(make(tmp_path, NAMES[:1], "full", **repos, **none))
    difference = pixels(pair.image_0).float() - pixels(full["00000000-0"][0].image_0).float()
    assert 0 < difference.abs().mean() < 5
    assert (backbone_class(str(sd15)), backbone_class(str(PIPELINE))) == (StableDiffusion, StableDiffusionXL)


@pytest.mark.parametrize(
    ("name", "text", "column"),
    [
        ("a.txt", "\ufeff fox \r\n\r\na bell, red\u2028really\r\nfox\n", None),
        ("a.csv", '\ufeffid,prompt\n1,fox\n2,"a bell, red\u2028really"\n3,\n4,fox\n', None),
        ("a.TSV", "text\tid\nfox\t1\na bell, red\u2028really\t2\n \t3\nfox\t4\n", "text"),
        ("a.jsonl", '{"p": "fox"}\n\n{"p": "a bell, red\\u2028really"}\n{"p": " fox"}\n', "p"),
    ],
)
def test_prompt_files(tmp_path, name, text, column):
    (tmp_path / name).write_text(text, encoding="utf-8", newline="")
    found = read_prompts(str(tmp_path / name), column)
    assert found == (["fox", "a bell, red\u2028really"], 1, 1)
    assert found.digest() == read_prompts(write_prompts(tmp_path, found.unique)).digest()
    assert found.digest() != read_prompts(write_prompts(tmp_path, found.unique[::-1])).digest()


@pytest.mark.parametrize(
    ("name", "data", "column", "message"),
    [
        ("a.txt", b" \n\n", None, "no prompt in .*a.txt, which has 2 rows"),
        ("a.txt", b"fox", "p", "prompt_column is 'p', but .* is text"),
        ("a.txt", b"\xff\xfe", None, "not UTF-8"),
        ("a.csv", b"a,b\n1,2\n", None, "no column 'prompt', only 'a', 'b'. Name it with --prompt_column"),
        ("a.csv", b"prompt\na, b\n", None, "line 2: more fields than the header names"),
        ("a.csv", b'prompt\n"a\n', None, "a.csv, unexpected end of data"),
        ("a.jsonl", b'{"prompt": "a"}\n{"p": "b"}\n', None, "line 2: no 'prompt', only 'p'"),
        ("a.jsonl", b'{"prompt": 3}\n', None, "line 1: 'prompt' is 3; it must be text"),
        ("a.jsonl", b"fox\n", None, "line 1: not JSON"),
        ("a.jsonl", b"[1]\n", None, "line 1: no 'prompt', only list"),
    ],
)
def test_bad_prompt_files(tmp_path, name, data, column, message):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=message):
        read_prompts(str(tmp_path / name), column)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rejected_guidance_scale": 5.0}, "Nothing tells the chosen side from the rejected"),
        ({"rejected_guidance_scale": 5.0, "rank_by": "colour", "same_noise": True}, "would be the same"),
        ({"steps": 0}, "steps is 0"),
        ({"height": 36}, "height is 36; it must be a multiple of 8"),
        ({"quality": 0}, "quality is 0"),
        ({"rank_by": "beauty"}, "'beauty' is not in"),
        ({"chosen_unet": "nowhere"}, "'nowhere' is neither a UNet folder"),
        ({"preset": "pick-safety"}, "--rejected_prefix"),
    ],
)
def test_bad_options_are_named_and_leave_nothing(tmp_path, options, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        make(tmp_path, NAMES[:1], **options)
    assert not (tmp_path / "out").exists()


def test_an_image_that_is_not_finite_is_named(tmp_path):
    unet = UNet2DConditionModel.from_pretrained(PIPELINE, subfolder="unet")
    with torch.no_grad():
        unet.conv_out.bias.fill_(torch.nan)
    unet.save_pretrained(tmp_path / "broken")
    with pytest.raises(ValueError, match=r"drew nothing for 'anchor', seed \d+: .* not finite in fp32"):
        make(tmp_path, NAMES[:1], chosen_unet=str(tmp_path / "broken"))
    assert not list((tmp_path / "out").glob("*.tar"))
    assert not list((tmp_path / "out").glob(".*"))


def test_what_is_no_denoiser_for_it_is_refused(sd15, tmp_path):
    backbone = StableDiffusionXL(str(PIPELINE))
    with pytest.raises(ValueError, match=r"unet.config.json: cross_attention_dim is 64, but must be 128 here"):
        load_denoiser(backbone, str(sd15 / "unet"))
    with pytest.raises(ValueError, match=r"is not a safetensors file"):
        load_denoiser(backbone, write_prompts(tmp_path, NAMES))
    file = PIPELINE / "vae/diffusion_pytorch_model.safetensors"
    with pytest.raises(ValueError, match="changes more than the UNet"):
        load_denoiser(backbone, str(file))
