"""Each source of own pairs: two commands lead to a running fit."""

import csv
import io
import json
import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from lit_align.cli import main
from lit_align.data import PreferenceDataModule
from lit_align.data.shards.layout import parse_sample, read_samples
from tests.support.paths import PAIRS, ROOT

SHARD = PAIRS / "train/00002.tar"
BUNDLED = [parse_sample(sample) for sample in read_samples(str(SHARD))]


def parquet(folder):
    names = ("jpg_0", "jpg_1", "label_0", "label_1", "caption")
    rows = [(p.image_0, p.image_1, p.label_0, 1 - p.label_0, p.prompt) for p in BUNDLED]
    table = pa.table(dict(zip(names, map(list, zip(*rows, strict=True)), strict=True)))
    pq.write_table(table, folder / "train-0.parquet", row_group_size=10)
    return ["pick-a-pic", f"--files={folder}/train-*.parquet", f"--output={folder}/out"]


def tar(folder):
    shutil.copy(SHARD, folder / "a.tar")
    return ["webdataset", f"--shards={folder}/*.tar", f"--output={folder}/out"]


def write_images(folder):
    for pair in BUNDLED:
        (folder / f"{pair.key}_0.png").write_bytes(pair.image_0)
        (folder / f"{pair.key}_1.png").write_bytes(pair.image_1)


def hpd(folder):
    write_images(folder)
    listed = []
    for pair in BUNDLED:
        names, preference = [f"{pair.key}_0.png", f"{pair.key}_1.png"], [int(pair.human > 0), int(pair.human < 0)]
        listed.append({"prompt": pair.prompt, "image_path": names, "human_preference": preference})
    (folder / "train.json").write_text(json.dumps(listed))
    return ["hpd", f"--annotations={folder}/train.json", f"--images={folder}", f"--output={folder}/out"]


def table(folder):
    write_images(folder)
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(["image_0", "image_1", "prompt", "label"])
    writer.writerows([f"{p.key}_0.png", f"{p.key}_1.png", p.prompt, f"{p.label_0:g}"] for p in BUNDLED)
    (folder / "pairs.csv").write_text(text.getvalue())
    return ["folder", f"--table={folder}/pairs.csv", f"--output={folder}/out"]


def two_folders(folder):
    for pair in BUNDLED:
        chosen, rejected = (pair.image_0, pair.image_1) if pair.human > 0 else (pair.image_1, pair.image_0)
        for name, image in (("good", chosen), ("bad", rejected)):
            (folder / name).mkdir(exist_ok=True)
            (folder / name / f"{pair.key}.png").write_bytes(image)
        (folder / "good" / f"{pair.key}.txt").write_text(pair.prompt)
    return ["folder", f"--chosen={folder}/good", f"--rejected={folder}/bad", f"--output={folder}/out"]


def read(shards):
    """Read the chosen and the rejected image of each pair, by prompt."""
    data = PreferenceDataModule(str(shards), resolution=32, batch_size=1, num_workers=0, flip_probability=0.0)
    data.setup("fit")
    return {batch.prompts[0]: torch.cat([batch.chosen, batch.rejected]) for batch in data.train_dataloader()}


@pytest.mark.parametrize("source", [parquet, tar, hpd, table, two_folders])
def test_from_a_source_to_a_running_fit_in_two_commands(tmp_path, monkeypatch, source):
    monkeypatch.chdir(ROOT)
    main(["import", *source(tmp_path), "--workers=1"])
    found, wanted = read(tmp_path / "out/index.json"), read(SHARD)
    assert found.keys() == wanted.keys()
    assert len(found) == 26
    assert all(torch.equal(found[prompt], wanted[prompt]) for prompt in wanted)
    options = [f"--data.train_shards={tmp_path}/out/index.json", "--data.val_shards=null", "--data.batch_size=2"]
    folder = ["--trainer.logger.init_args.save_dir", str(tmp_path), "--trainer.callbacks=null"]
    main(["fit", "--config=configs/quickstart.yaml", *options, *folder, "--trainer.max_steps=1"])
