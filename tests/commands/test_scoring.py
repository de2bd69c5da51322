"""Scores from shards to batches: side files, votes while reading, votes while training, the report."""

import io
import json
import os
import shutil
import subprocess
import sys
import time

import lightning as L
import pytest
import torch
import yaml
from PIL import Image

from lit_align.cli import main
from lit_align.commands.importing.command import webdataset
from lit_align.commands.score.agreement import ScoredPairs, measure
from lit_align.commands.score.scoring import ShardToScore, unfinished
from lit_align.data import PreferenceDataModule, SampleError
from lit_align.data.labels.score_files import read_scores, side_file
from lit_align.data.shards.index import index_shard
from lit_align.objectives import BalancedDPO, DiffusionDPO
from lit_align.scoring import Colourfulness, Exposure, Sharpness
from lit_align.scoring.presets import load_scorers
from lit_align.scoring.vote import Vote
from lit_align.training.metrics import PreferenceMetrics
from lit_align.types import ObjectiveOutput, PairErrors
from tests.support.paths import PAIRS, ROOT
from tests.support.processes import fork
from tests.support.runs import KeepLogs, equal, fit, make_module, weights
from tests.support.shards import read_dicts, write_dicts

EMOJI_SCORERS = ROOT / "assets/emoji/scorers/scorers.yaml"
NAMES = ["colour", "sharp", "exposure"]
CLASSES = {"colour": Colourfulness, "sharp": Sharpness, "exposure": Exposure}
SKIP_TIES = Vote(NAMES, ties="skip")
IN_ANOTHER_ORDER = r'read its pairs in another order \(labels was "majority of colour, sharp'


@pytest.fixture(scope="session")
def presets(tmp_path_factory):
    path = tmp_path_factory.mktemp("presets") / "analytic.yaml"
    classes = {name: {"class_path": f"lit_align.scoring.{cls.__name__}"} for name, cls in CLASSES.items()}
    path.write_text(yaml.safe_dump(classes))
    return path


def copy_shards(folder, count=2, pairs=PAIRS):
    """Some bundled shards of 26 pairs each, where side files may be written."""
    folder.mkdir(exist_ok=True)
    return [shutil.copy(pairs / f"train/0000{i}.tar", folder) for i in range(count)]


def score(shards, presets, *options, scorers=NAMES):
    words = [f"--shards=[{','.join(map(str, shards))}]", f"--scorers={','.join(scorers)}", f"--presets={presets}"]
    main(["score", *words, "--accelerator=cpu", *options])


def rewrite(shard, change):
    """Write a shard anew, after `change` has seen its list of samples."""
    samples = read_dicts(shard)
    change(samples)
    write_dicts(shard, samples)


def data(shards, **options):
    settings = {"resolution": 32, "batch_size": 13, "num_workers": 0, "shuffle_window": 8, "flip_probability": 0.5}
    return PreferenceDataModule([str(s) for s in shards], **{**settings, **options})


def batches(module):
    module.setup("fit")
    return [module.on_after_batch_transfer(batch, 0) for batch in module.train_dataloader()]


def chosen_by_prompt(module):
    """The chosen image of every pair that counts, unmirrored, with its share of the vote."""
    found = {}
    for batch in batches(module):
        for row, prompt in enumerate(batch.prompts):
            image = batch.chosen[row].flip(-1) if batch.pairs.flipped[row] else batch.chosen[row]
            if batch.pairs.weight[row]:
                found[prompt] = image, batch.pairs.vote_share[row].item(), batch.pairs.human[row].item()
    return found


# -- lit-align score


def test_side_files_hold_the_scores_of_the_images(tmp_path, presets):
    (shard,) = copy_shards(tmp_path, 1)
    score([shard], presets, scorers=["colour", "sharp"])
    score([shard], presets, scorers=["exposure"])  # adds to the file
    found = read_scores(side_file(shard))
    assert sorted(found) == sorted(NAMES)
    samples = read_dicts(shard)
    assert found["sharp"].keys == [sample["__key__"] for sample in samples] == found["exposure"].keys
    for row in (0, 7, 25):
        for name, scorer in CLASSES.items():
            for side, scores in enumerate((found[name].score_0, found[name].score_1)):
                image = Image.open(io.BytesIO(samples[row][f"jpg_{side}.png"])).convert("RGB")
                pixels = (
                    torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(32, 32, 3).permute(2, 0, 1)
                )
                assert scorer().score([pixels], [""]).item() == pytest.approx(scores[row].item(), rel=1e-6)
    assert found["colour"].identity == (Colourfulness.version, Colourfulness().fingerprint())
    assert list(tmp_path.glob("*.part")) == []


def test_finished_shards_are_not_scored_again(tmp_path, presets, capsys):
    shards = copy_shards(tmp_path, 2)
    score(shards[:1], presets)
    before = side_file(shards[0]).stat().st_mtime_ns
    capsys.readouterr()
    score(shards, presets)
    assert "scored 1 shards, 1 were done before" in capsys.readouterr().out
    assert side_file(shards[0]).stat().st_mtime_ns == before


def test_scores_of_other_keys_do_not_count(tmp_path, presets):
    """A shard whose samples were given new keys is scored again, though it has as many scores."""
    (shard,) = copy_shards(tmp_path, 1)
    score([shard], presets, scorers=["sharp"])
    known = {"sharp": read_scores(side_file(shard))["sharp"].identity}
    assert list(unfinished([str(shard)], None, known, False)) == []
    rewrite(shard, lambda samples: [sample.update(__key__=f"new{i:03d}") for i, sample in enumerate(samples)])
    assert list(unfinished([str(shard)], None, known, False)) == [ShardToScore(str(shard), 26, ["sharp"])]


def test_killed_scoring_goes_on_and_ends_with_the_same_files(tmp_path, presets):
    """SIGKILL as soon as the second of four files is there; half a file never is."""
    whole, killed = copy_shards(tmp_path / "whole", 4), copy_shards(tmp_path / "killed", 4)
    score(whole, presets)

    def slowly():
        quick = Sharpness._score
        Sharpness._score = lambda self, *inputs: time.sleep(0.3) or quick(self, *inputs)
        score(killed, presets)

    process = fork(slowly)
    deadline = time.monotonic() + 100
    while not side_file(killed[1]).exists():
        assert time.monotonic() < deadline
        assert process.is_alive()
        time.sleep(0.01)
    process.kill()
    process.join()
    assert not side_file(killed[3]).exists()
    done = side_file(killed[0]).stat().st_mtime_ns
    score(killed, presets)
    assert side_file(killed[0]).stat().st_mtime_ns == done
    for one, other in zip(whole, killed, strict=True):
        assert side_file(one).read_bytes() == side_file(other).read_bytes()


def test_two_processes_share_the_shards(tmp_path, presets):
    alone, shared = copy_shards(tmp_path / "alone", 3), copy_shards(tmp_path / "shared", 3)
    score(alone, presets)
    words = [f"--shards=[{','.join(shared)}]", f"--scorers={','.join(NAMES)}", f"--presets={presets}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "lit_align", "score", *words, "--accelerator=cpu", "--devices=2", "--report"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-2000:]
    assert "process 1 of 2, cpu: scored 2 shards" in result.stdout
    assert "process 2 of 2, cpu: scored 1 shards" in result.stdout
    for one, other in zip(alone, shared, strict=True):
        assert side_file(one).read_bytes() == side_file(other).read_bytes()
    assert (tmp_path / "shared/agreement.png").stat().st_size > 5000


def test_scores_by_other_weights_are_not_replaced_unasked(tmp_path, presets, monkeypatch):
    (shard,) = copy_shards(tmp_path, 1)
    score([shard], presets)
    monkeypatch.setattr(Sharpness, "version", Sharpness.version + 1)
    with pytest.raises(ValueError, match=r"has scores by 'sharp', version 1.*or replace them with --overwrite"):
        score([shard], presets)
    score([shard], presets, "--overwrite")
    assert read_scores(side_file(shard))["sharp"].identity.version == Sharpness.version


def test_broken_images_stop_or_are_counted(tmp_path, presets, capsys, caplog):
    (shard,) = copy_shards(tmp_path, 1)
    rewrite(shard, lambda samples: samples[4].update({"jpg_1.png": b"not an image"}))
    with pytest.raises(SampleError, match="an image cannot be decoded"):
        score([shard], presets)
    assert not side_file(shard).exists()
    score([shard], presets, "--on_error=skip")
    assert "skipped 1 samples" in capsys.readouterr().out
    found = read_scores(side_file(shard))["sharp"]
    assert len(found.keys) == 26
    assert len(found.rows()) == 25
    score([shard], presets, "--on_error=skip")  # the shard is done
    assert "scored 0 shards, 1 were done before" in capsys.readouterr().out
    score([shard], presets, "--on_error=skip", "--overwrite")
    assert "scored 0 shards, 1 were done before" in capsys.readouterr().out
    with pytest.raises(SampleError, match="lacks a score of it"):
        batches(data([shard], vote=SKIP_TIES))
    assert (
        sum(len(batch.prompts) for batch in batches(data([shard], vote=SKIP_TIES, on_error="skip", batch_size=5))) == 25
    )


# -- votes while reading


def test_a_vote_orders_the_pairs(tmp_path, presets):
    shards = copy_shards(tmp_path)
    score(shards, presets)
    colours = {}
    for name, vote, sign in (
        ("colour", Vote(["colour"], rule="single"), -1),  # the human label prefers the one without colour
        ("sharp", Vote(["sharp"], rule="single"), 1),
    ):
        found = batches(data(shards, vote=vote))
        assert all(batch.pairs.voted for batch in found)
        assert {human for batch in found for human in batch.pairs.human.tolist()} == {sign}
        colours[name] = torch.cat([Colourfulness()._score(list(batch.chosen), batch.prompts) for batch in found])
    assert colours["sharp"].max() < 1 < 10 < colours["colour"].min()


def test_voting_offline_and_in_the_loop_orders_every_pair_alike(tmp_path):
    """The three bundled scorers, on mirrored and plain pixels, whatever the batches are."""
    shards = copy_shards(tmp_path, 4, PAIRS.parent / "flat-over-color")  # on which they often disagree
    names = ["clip", "style", "colour"]
    score(shards, EMOJI_SCORERS, scorers=names)
    for vote in (Vote(names), Vote(["clip", "style"], ties="prefer:colour"), Vote([*names, "human"], ties="skip")):
        offline = chosen_by_prompt(data(shards, vote=vote, batch_size=4))
        live = chosen_by_prompt(
            data(shards, vote=vote, batch_size=13, seed=1, scorers=load_scorers(names, EMOJI_SCORERS))
        )
        both = offline.keys() & live.keys()
        assert len(both) > (90 if vote.ties != "skip" else 50)  # of 104: what does not fill a batch sits out
        for prompt in both:
            assert torch.equal(offline[prompt][0], live[prompt][0]), prompt
            assert offline[prompt][1:] == live[prompt][1:]
    signs = [human for _, _, human in offline.values()]
    assert 0 < signs.count(-1) < len(signs)  # the vote is not the human label in disguise


def test_undecided_pairs_are_left_out_or_weigh_nothing(tmp_path, presets):
    (shard,) = copy_shards(tmp_path, 1)

    def tie(samples):
        for sample in samples[:3]:  # twice the same image: every scorer abstains, and so does the human
            sample |= {"jpg_0.png": sample["jpg_1.png"], "label_0.txt": b"0.5", "label_1.txt": b"0.5"}

    rewrite(shard, tie)
    score([shard], presets)
    stored = data([shard], vote=SKIP_TIES, batch_size=1)
    assert len(batches(stored)) == 23
    assert stored.train.shards[0].ties == 3
    scorers = {name: cls() for name, cls in CLASSES.items()}
    live = batches(data([shard], vote=SKIP_TIES, batch_size=1, scorers=scorers))
    assert len(live) == 26
    assert sum(batch.pairs.weight.item() for batch in live) == 23


def test_human_ties_are_decided_by_the_vote(tmp_path, presets):
    (shard,) = copy_shards(tmp_path, 1)
    rewrite(
        shard, lambda samples: [sample.update({"label_0.txt": b"0.5", "label_1.txt": b"0.5"}) for sample in samples]
    )
    score([shard], presets)
    found = batches(data([shard], vote=Vote(["colour"])))
    assert sum(len(batch.prompts) for batch in found) == 26
    assert {human for batch in found for human in batch.pairs.human.tolist()} == {0}
    with pytest.raises(ValueError, match=r"no pair with a preference in 1 shards \(26 ties\)"):
        batches(data([shard]))


def test_missing_scores_are_a_clear_error(tmp_path, presets):
    shards = copy_shards(tmp_path)
    with pytest.raises(ValueError, match=r"no scores by 'colour' for .*00000\.tar and 1 other.*lit-align score"):
        batches(data(shards, vote=SKIP_TIES))
    score(shards[:1], presets)
    with pytest.raises(ValueError, match=r"data\.train_shards: 1 of 2 shards have no scores by 'colour'.*00001\.tar"):
        batches(data(shards, vote=SKIP_TIES))
    some = data(shards, vote=SKIP_TIES, on_error="skip")
    batches(some)
    assert [(len(shard), len(shard.broken)) for shard in some.train.shards] == [(26, 0), (0, 26)]


@pytest.mark.parametrize("field", ["jpg_0.png", "caption.txt"])
def test_stale_scores_stop_or_are_counted(tmp_path, presets, field):
    """A pair whose image or prompt has changed since it was scored."""
    (shard,) = copy_shards(tmp_path, 1)
    score([shard], presets)
    other = read_dicts(PAIRS / "train/00007.tar")[0]
    rewrite(shard, lambda samples: samples[4].update({field: other[field]}))
    with pytest.raises(SampleError, match="its scores are stale"):
        batches(data([shard], vote=SKIP_TIES))
    skipped = batches(data([shard], vote=SKIP_TIES, on_error="skip"))
    assert sum(batch.pairs.weight.sum().item() for batch in skipped) == 25
    assert ["its scores are stale" in fault for batch in skipped for fault in batch.pairs.faults] == [True]
    index_shard(str(shard))  # knows what the shard holds now: found out before the first step
    with pytest.raises(SampleError, match="its scores are stale"):
        data([shard], vote=SKIP_TIES).setup("fit")
    score([shard], presets, "--overwrite")
    assert sum(batch.pairs.weight.sum().item() for batch in batches(data([shard], vote=SKIP_TIES))) == 26


def test_shards_scored_by_different_weights_are_refused(tmp_path, presets, monkeypatch):
    shards = copy_shards(tmp_path)
    score(shards[:1], presets)
    monkeypatch.setattr(Sharpness, "version", 7)
    score(shards[1:], presets)
    with pytest.raises(ValueError, match=r"Scores by 'sharp' are stale: .*version 1.*version 7"):
        batches(data(shards, vote=SKIP_TIES))


def test_side_files_in_a_folder_of_their_own(tmp_path, presets):
    shards = copy_shards(tmp_path / "shards")
    score(shards, presets, f"--output={tmp_path}/scores")
    assert [path.name for path in (tmp_path / "shards").iterdir() if path.suffix != ".tar"] == []
    assert len(batches(data(shards, vote=SKIP_TIES, train_scores=str(tmp_path / "scores")))) == 4


def test_shards_of_one_name_do_not_share_a_side_file(tmp_path, presets):
    shards = [*copy_shards(tmp_path / "one", 1), *copy_shards(tmp_path / "two", 1)]
    with pytest.raises(ValueError, match=r"one/00000\.tar and .*two/00000\.tar would share the scores in"):
        score(shards, presets, f"--output={tmp_path}/scores")
    score(shards, presets)
    assert len(batches(data(shards, vote=SKIP_TIES))) == 4
    with pytest.raises(ValueError, match="would share the scores in"):
        batches(data(shards, vote=SKIP_TIES, train_scores=str(tmp_path / "one")))


def test_a_damaged_side_file_is_named(tmp_path):
    (shard,) = copy_shards(tmp_path, 1)
    side_file(shard).write_bytes(b"PAR1 and then nothing")
    with pytest.raises(ValueError, match=r"00000\.scores\.parquet cannot be read as Parquet.*Delete it"):
        read_scores(side_file(shard))


def test_normalized_takes_its_scale_from_the_data_set(tmp_path, presets):
    shards = copy_shards(tmp_path)
    score(shards, presets)
    module = data(shards, vote=Vote(NAMES, rule="normalized"))
    batches(module)
    for name in NAMES:
        files = [read_scores(side_file(shard))[name] for shard in shards]
        values = torch.cat([torch.cat([file.score_0, file.score_1]) for file in files]).double()
        assert module.train.labels.surveys[name].scale == pytest.approx(values.std(correction=0).item(), rel=1e-9)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scorers": {}}, "data.scorers is set, but data.vote is not"),
        ({"scorers": {"colour": None}, "vote": Vote(["sharp"])}, "data.scorers lacks 'sharp'"),
        ({"scorers": {"sharp": None}, "vote": Vote(["sharp"], rule="random")}, "looks at the whole data set"),
    ],
)
def test_senseless_live_votes_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        data(["unused"], **options)


# -- votes in a run


def run_settings(tmp_path, vote, **options):
    logger = KeepLogs()
    checkpoint = L.pytorch.callbacks.ModelCheckpoint(tmp_path, every_n_train_steps=1, save_last=True)
    return data(copy_shards(tmp_path / "shards"), vote=vote, **options), logger, checkpoint


def test_votes_are_logged_and_resumed_exactly(tmp_path, presets):
    score(copy_shards(tmp_path / "shards"), presets)
    vote = Vote(NAMES)
    stored, logger, checkpoint = run_settings(tmp_path, vote)
    options = {"logger": logger, "log_every_n_steps": 1}
    fit(make_module(objective=BalancedDPO()), stored, tmp_path, 2, callbacks=[checkpoint], **options)
    row = next(row for _, row in logger.rows if "train/loss" in row)
    assert row["train/vote/share"] == pytest.approx(2 / 3)  # colour and sharpness always contradict each other
    assert row["train/vote/ties"] == 0
    first = batches(run_settings(tmp_path, vote)[0])[0]
    agreed = (first.pairs.human == 1).sum().item() / 13
    assert 0 < agreed < 1
    assert row["train/vote/human_agreement"] == pytest.approx(agreed)
    # The n-th batch is the same, and a run with another vote is refused.
    whole = make_module(objective=BalancedDPO())
    fit(whole, run_settings(tmp_path, vote)[0], tmp_path, 3)
    resumed = make_module(objective=BalancedDPO())
    fit(resumed, run_settings(tmp_path, vote)[0], tmp_path, 3, tmp_path / "last.ckpt")
    assert equal(weights(resumed), weights(whole))
    for other in (Vote(NAMES, ties="skip"), Vote(NAMES[:1])):
        with pytest.raises(ValueError, match=IN_ANOTHER_ORDER):
            fit(resumed, run_settings(tmp_path, other)[0], tmp_path, 3, tmp_path / "last.ckpt")


def test_a_run_on_votes_does_not_go_on_with_human_labels(tmp_path, presets):
    """Diffusion-DPO takes both, so that only the order of the pairs tells them apart."""
    score(copy_shards(tmp_path / "shards"), presets)
    stored, _, checkpoint = run_settings(tmp_path, Vote(NAMES))
    fit(make_module(objective=DiffusionDPO()), stored, tmp_path, 1, callbacks=[checkpoint])
    with pytest.raises(ValueError, match=IN_ANOTHER_ORDER):
        fit(make_module(objective=DiffusionDPO()), run_settings(tmp_path, None)[0], tmp_path, 2, tmp_path / "last.ckpt")


def test_live_votes_train_the_same_weights_as_stored_ones(tmp_path, presets):
    score(copy_shards(tmp_path / "shards"), presets)
    scorers = {name: cls() for name, cls in CLASSES.items()}
    ends = []
    for options in ({}, {"scorers": scorers}):
        module = make_module(objective=BalancedDPO())
        fit(module, run_settings(tmp_path, Vote(NAMES), **options)[0], tmp_path, 3)
        ends.append(weights(module))
    assert equal(*ends)


def test_exchanged_images_and_scores_train_the_same_weights(tmp_path, presets):
    """Image 0 becomes image 1 in every pair, and is scored as such: the same run, bit for bit."""

    def exchange(samples):
        for sample in samples:
            for field in ("jpg_{}.png", "label_{}.txt"):
                first, second = field.format(0), field.format(1)
                sample[first], sample[second] = sample[second], sample[first]

    ends = []
    for name in ("as_it_is", "exchanged"):
        (shard,) = copy_shards(tmp_path / name, 1)
        if name == "exchanged":
            rewrite(shard, exchange)
        score([shard], presets)
        module = make_module(objective=BalancedDPO())
        fit(module, data([shard], vote=Vote(NAMES)), tmp_path, 2)
        ends.append(weights(module))
    assert equal(*ends)


def test_balanced_dpo_without_a_vote_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"BalancedDPO learns from votes.*Set data\.vote, or choose DiffusionDPO"):
        fit(make_module(objective=BalancedDPO()), data(copy_shards(tmp_path, 1)), tmp_path, 1)


# -- the report


def test_agreement_by_hand():
    """Four pairs: colour is always right, style twice and once undecided, the human tied once."""
    human = torch.tensor([1, -1, 1, 0])
    scores = {
        "colour": torch.tensor([[9.0, 1.0, 5.0, 2.0], [1.0, 9.0, 1.0, 1.0]], dtype=torch.float64),
        "style": torch.tensor([[0.1, 0.1, -0.2, 0.0], [0.0, 0.3, 0.1, 0.0]], dtype=torch.float64),
    }
    found = measure(ScoredPairs(human, scores, unscored=2))
    assert found["agreement"]["colour"]["human"] == 1
    assert found["agreement"]["style"]["human"] == pytest.approx(2 / 3)
    assert found["agreement"]["style"]["colour"] == pytest.approx(2 / 3)
    assert found["consensus_ties"] == 0.25  # the third pair; on the fourth colour decides alone
    assert found["agreement"]["consensus"]["human"] == 1
    assert found["unanimous"] == 0.5
    assert found["unanimous_with_human"] == 0.5
    assert found["human_ties"] == 1
    assert found["scales"]["colour"]["median_difference"] == 4
    assert found["scales"]["style"]["ties"] == 0.25


def test_report_is_printed_and_saved(tmp_path, presets, capsys):
    shards = copy_shards(tmp_path)
    score(shards, presets, "--report")
    printed = capsys.readouterr().out
    assert "| human | 100.0% | 0.0% | 100.0% |" in printed
    found = json.loads((tmp_path / "agreement.json").read_text())
    assert found["pairs"] == 52
    assert found["agreement"]["colour"]["sharp"] == 0
    assert (tmp_path / "agreement.md").read_text() in printed
    assert len(Image.open(tmp_path / "agreement.png").getcolors(10**6)) > 50


@pytest.mark.parametrize(
    "environment",
    [
        {"WORLD_SIZE": "3", "RANK": "1", "LOCAL_RANK": "0", "GROUP_RANK": "0", "TORCHELASTIC_RUN_ID": "1"},
        {
            "SLURM_NTASKS": "3",
            "SLURM_NTASKS_PER_NODE": "3",
            "SLURM_PROCID": "1",
            "SLURM_LOCALID": "1",
            "SLURM_JOB_NAME": "score",
            "SLURM_NODEID": "0",
        },
    ],
    ids=["torchrun", "slurm"],
)
def test_processes_of_a_launcher_take_their_share(tmp_path, presets, monkeypatch, capsys, environment):
    """The second of three, whatever number of devices it sees."""
    for name, value in (environment | {"LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "x", "MASTER_PORT": "1"}).items():
        monkeypatch.setenv(name, value)
    shards = copy_shards(tmp_path, 4)
    score(shards, presets)
    assert [side_file(shard).exists() for shard in shards] == [False, True, False, False]
    assert "process 2 of 3, cpu: scored 1 shards" in capsys.readouterr().out


def test_an_index_is_scored_and_the_command_says_that_all_is_there(tmp_path, presets, monkeypatch, capsys):
    """Two processes, one after the other: the first says what is still to come."""
    shards = copy_shards(tmp_path / "tars", 4)
    webdataset(f"{tmp_path}/tars", str(tmp_path / "index"), 1)
    for name, value in {"TORCHELASTIC_RUN_ID": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("RANK", "0")
    score([tmp_path / "index/index.json"], presets)
    said = capsys.readouterr().out
    assert "2 of 4 shards' scores are still to come. Other processes are at work on them. If none is running" in said
    assert "all 4 shards" not in said
    monkeypatch.setenv("RANK", "1")
    score([tmp_path / "index/index.json"], presets)
    assert "all 4 shards have scores by colour, sharp, exposure" in capsys.readouterr().out
    assert all(side_file(shard).exists() for shard in shards)


def test_an_empty_shard_needs_no_scores(tmp_path, presets, capsys):
    shards = copy_shards(tmp_path, 2)
    rewrite(shards[1], lambda samples: samples.clear())
    score(shards, presets, "--report")
    assert "scored 1 shards, 1 were done before" in capsys.readouterr().out
    assert len(batches(data(shards, vote=SKIP_TIES))) == 2


def test_two_samples_of_one_key_are_refused(tmp_path, presets):
    (shard,) = copy_shards(tmp_path, 1)
    rewrite(shard, lambda samples: samples[20].update({"__key__": samples[3]["__key__"]}))
    with pytest.raises(SampleError, match=r"00000\.tar has the key .* twice"):
        score([shard], presets)


def test_a_new_scorer_beside_stale_scores_is_found_out(tmp_path, presets):
    """One scorer saw the old image, the others the new one."""
    (shard,) = copy_shards(tmp_path, 1)
    score([shard], presets, scorers=["colour"])
    other = read_dicts(PAIRS / "train/00007.tar")[0]
    rewrite(shard, lambda samples: samples[4].update({"jpg_0.png": other["jpg_0.png"]}))
    score([shard], presets, scorers=["sharp", "exposure"])
    with pytest.raises(SampleError, match=r"its scores are stale.*--overwrite"):
        batches(data([shard], vote=SKIP_TIES))
    score([shard], presets, "--overwrite")
    assert sum(batch.pairs.weight.sum().item() for batch in batches(data([shard], vote=SKIP_TIES))) == 26


def test_undecided_pairs_of_a_live_vote_are_logged_as_ties(tmp_path):
    """They weigh nothing, and are counted all the same."""
    scorers = {name: cls() for name, cls in CLASSES.items()}
    module = data(copy_shards(tmp_path, 1), vote=Vote(NAMES, rule="unanimous", ties="skip"), scorers=scorers)
    metrics = PreferenceMetrics([], timesteps=1000)
    for batch in batches(module):
        assert batch.pairs.weight.sum() == 0  # colour and sharpness never agree here
        ones = torch.ones(len(batch.prompts))
        metrics.observe(ObjectiveOutput(ones, ones, {}), PairErrors(ones, ones), torch.zeros(len(ones)), batch.pairs)
    assert metrics.compute()["vote/ties"] == 1


def test_scorer_command_names_unknown_scorers(presets):
    with pytest.raises(ValueError, match=r"'beauty' is not in .*Choose from colour, exposure, sharp"):
        score([PAIRS / "train/00000.tar"], presets, scorers=["beauty"])
    with pytest.raises(ValueError, match="scorers is empty"):
        score([PAIRS / "train/00000.tar"], presets, scorers=[""])
