"""Sources that several files import."""

import pytest

from tests.support.imports import BUNDLED, encoded, row, write_parquet


@pytest.fixture
def parquet(tmp_path):
    """Two files of 7 and 5 rows: row groups of 3, a tie, and each reason to reject a row."""
    good, cut = BUNDLED[1].image_1, encoded(BUNDLED[1].image_1, "JPEG")[:-20]
    first = [row(0), row(1, 0.5), row(2, 0.0), row(3, has_label=False), row(4), row(5, jpg_1=cut), row(6)]
    second = [row(7), row(8, jpg_0=good, jpg_1=good), row(9, label_1=1.0, label_0=1.0), row(10, jpg_0=None), row(11)]
    write_parquet(tmp_path / "data/train-0.parquet", first)
    write_parquet(tmp_path / "data/train-1.parquet", second)
    return f"{tmp_path}/data/train-*.parquet"


@pytest.fixture
def images(tmp_path):
    """A folder with images train/0.jpg to train/5.jpg."""
    (tmp_path / "train").mkdir()
    for number in range(6):
        (tmp_path / f"train/{number}.jpg").write_bytes(BUNDLED[number].image_0)
    return tmp_path
