"""Unpack a shard into two folders of images with captions: unpack_pairs.py SHARD FOLDER."""

import sys
import tarfile
from collections import defaultdict
from pathlib import Path


def main(shard: str, folder: str) -> None:
    samples: dict[str, dict[str, bytes]] = defaultdict(dict)
    with tarfile.open(shard) as tar:
        for member in tar:
            key, _, field = member.name.partition(".")
            samples[key][field.split(".")[0]] = tar.extractfile(member).read()
    for key, sample in samples.items():
        chosen = "jpg_0" if float(sample["label_0"]) == 1 else "jpg_1"
        rejected = "jpg_1" if chosen == "jpg_0" else "jpg_0"
        for side, field in (("good", chosen), ("bad", rejected)):
            path = Path(folder, side, f"{key}.png")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(sample[field])
        Path(folder, "good", f"{key}.txt").write_bytes(sample["caption"])


if __name__ == "__main__":
    main(*sys.argv[1:])
