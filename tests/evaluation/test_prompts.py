"""Files of prompts as benchmarks publish them, and the bundled sets."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lit_align.data.shards.layout import parse_sample, read_samples
from lit_align.evaluation.prompts import SETS, read_prompts, set_names
from tests.support.paths import ROOT

PARTI = (
    "Prompt\tCategory\tChallenge\tNote\r\n"
    "a red fox\tAnimals\tBasic\tfound in woods\r\n"
    '"G I G G L E" painted in thick letters\tIllustrations\tWriting & Symbols\t\r\n'
    'Dogs playing poker\tAnimals\tImagination\tDescription of "Dogs Playing Poker"\r\n'
)


def test_parti_prompts_quotes_nothing(tmp_path):
    """One of its prompts begins with a quotation mark that quotes no cell."""
    (tmp_path / "PartiPrompts.tsv").write_text(PARTI, newline="")
    found = read_prompts(str(tmp_path / "PartiPrompts.tsv"))
    assert found == (["a red fox", '"G I G G L E" painted in thick letters', "Dogs playing poker"], 0, 0)
    assert read_prompts(str(tmp_path / "PartiPrompts.tsv"), "Category").unique == ["Animals", "Illustrations"]


def test_another_tsv_does_quote(tmp_path):
    (tmp_path / "a.tsv").write_text('Prompt\tId\n"a ""red"" fox"\t1\n')
    assert read_prompts(str(tmp_path / "a.tsv"), "Prompt").unique == ['a "red" fox']
    with pytest.raises(ValueError, match=r"no column 'prompt', only 'Prompt', 'Id'\. Name it with --prompt_column"):
        read_prompts(str(tmp_path / "a.tsv"))


@pytest.mark.parametrize(
    "content",
    [
        [{"prompt": "a fox", "metadata": {}}, {"prompt": " a fox"}, {"prompt": ""}, {"prompt": "an ox"}],
        ["a fox", "a fox", "", "an ox"],
    ],
    ids=["objects, as HPDv2's benchmark", "strings, as HPSv2's"],
)
def test_json(tmp_path, content):
    (tmp_path / "benchmark.json").write_text(json.dumps(content))
    found = read_prompts(str(tmp_path / "benchmark.json"))
    assert found == (["a fox", "an ox"], 1, 1)
    assert str(found) == "2 prompts; left out: 1 repeated, 1 blank"


def test_parquet_of_pick_a_pic(tmp_path):
    """The column is `caption`, with several pairs per prompt; if there is a column `prompt` too, neither is chosen."""
    path = tmp_path / "test.parquet"
    captions = pa.array(["a fox", "a fox", None, "an ox"])
    pq.write_table(pa.table({"caption": captions, "label_0": [1, 0, 1, 0]}), path, row_group_size=2)
    assert read_prompts(str(path)) == (["a fox", "an ox"], 1, 1)
    pq.write_table(pa.table({"prompt": captions, "label_0": [1, 0, 1, 0]}), path)
    assert read_prompts(str(path)).unique == ["a fox", "an ox"]
    pq.write_table(pa.table({"prompt": captions, "caption": captions}), path)
    with pytest.raises(ValueError, match=r"has columns 'prompt' and 'caption'\. Say which with --prompt_column"):
        read_prompts(str(path))
    assert read_prompts(str(path), "caption").unique == ["a fox", "an ox"]


@pytest.mark.parametrize(
    ("name", "content", "column", "message"),
    [
        ("a.json", b'{"prompt": "a"}', None, "it holds a dict; a list of objects or of strings is needed"),
        ("a.json", b'["a", 3]', None, "entry 2: no 'prompt', only int"),
        ("a.json", b'["a"]', "p", "entry 1: no 'p', only str"),
        ("a.json", b"[", None, "a.json, Expecting value"),
        ("a.parquet", b"no parquet", None, "a.parquet, "),
    ],
)
def test_bad_files(tmp_path, name, content, column, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_prompts(str(tmp_path / name), column)


def test_parquet_without_the_column(tmp_path):
    pq.write_table(pa.table({"label_0": [1]}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"no column 'prompt', only 'label_0'\. Name it with --prompt_column"):
        read_prompts(str(tmp_path / "a.parquet"))
    with pytest.raises(ValueError, match=r"row 1: 'label_0' is 1; it must be text"):
        read_prompts(str(tmp_path / "a.parquet"), "label_0")


def test_our_sets():
    """No training pair shows an emoji of the set."""
    assert set_names() == ["emoji", "general"]
    held_out, trained = (
        {
            parse_sample(sample).prompt
            for shard in sorted((ROOT / "assets/emoji/pairs").glob(f"*/{split}/*.tar"))
            for sample in read_samples(str(shard))
        }
        for split in ("held_out", "train")
    )
    emoji, general = read_prompts("emoji"), read_prompts("general")
    assert set(emoji.unique) == held_out
    assert not set(emoji.unique) & trained
    assert (len(emoji.unique), len(general.unique)) == (72, 50)
    assert (emoji.repeated, emoji.blank, general.repeated, general.blank) == (0, 0, 0, 0)
    assert read_prompts(str(SETS / "general.txt")) == general
    with pytest.raises(ValueError, match="prompt_column is 'p'"):
        read_prompts("general", "p")
    with pytest.raises(FileNotFoundError, match="generals"):
        read_prompts("generals")


def test_a_byte_order_mark_is_no_part_of_a_prompt_and_what_is_left_out_is_counted(tmp_path):
    (tmp_path / "a.txt").write_text("\ufeffa fox\n\n an ox \na fox\n\n\n", encoding="utf-8")
    found = read_prompts(str(tmp_path / "a.txt"))
    assert found == (["a fox", "an ox"], 1, 3)
    assert str(found) == "2 prompts; left out: 1 repeated, 3 blank"
    assert found.digest() != found._replace(unique=["an ox", "a fox"]).digest()  # images are numbered in this order


def test_a_limit_is_spread_over_the_file(tmp_path):
    (tmp_path / "a.txt").write_text("\n".join(map(str, range(10))))
    found = read_prompts(str(tmp_path / "a.txt"))
    assert found.spread(3).unique == ["0", "3", "6"]
    assert found.spread(100).unique == found.unique
