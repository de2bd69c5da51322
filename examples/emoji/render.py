"""Render Microsoft's Fluent Emoji into WebDataset shards of preference pairs.

    npm pack @iconify-json/fluent-emoji@1.2.7 @iconify-json/fluent-emoji-flat@1.2.6 \\
             @iconify-json/fluent-emoji-high-contrast@1.2.6
    pip install resvg-py==0.5.0
    python examples/emoji/render.py --packages . --output assets/emoji/pairs

Each pair is one emoji in two styles under its name in words. Which style is image 0 is drawn
per pair, so that only the label tells which one is preferred.
"""

import argparse
import io
import json
import random
import tarfile
from pathlib import Path

import resvg_py
import webdataset as wds
from PIL import Image

STYLES = {
    "color": "fluent-emoji",
    "flat": "fluent-emoji-flat",
    "high_contrast": "fluent-emoji-high-contrast",
}
PREFERENCES = [("high_contrast", "color"), ("flat", "color")]  # (preferred, other)
PIXELS = 32
HELD_OUT = 72
PAIRS_PER_SHARD = 26
SEED = 0


def load_icons(packages: Path, package: str) -> dict[str, dict[str, object]]:
    """Icons by name, from the npm tarball of an iconify package in the folder `packages`."""
    tarballs = sorted(packages.glob(f"iconify-json-{package}-[0-9]*.tgz"))
    if len(tarballs) != 1:
        raise SystemExit(f"{packages} holds {len(tarballs)} tarballs of @iconify-json/{package}; one is needed.")
    with tarfile.open(tarballs[0]) as tarball:
        member = tarball.extractfile("package/icons.json")
        assert member is not None
        icons: dict[str, dict[str, object]] = json.load(member)["icons"]
    return icons


def render(icon: dict[str, object], pixels: int = PIXELS) -> Image.Image:
    """One icon as an RGB image on white; iconify leaves the colour of one-colour icons open, here black."""
    body = str(icon["body"]).replace("currentColor", "#000")
    width, height = icon.get("width", 32), icon.get("height", 32)
    size = f'width="{pixels}" height="{pixels}" viewBox="0 0 {width} {height}"'  # centred where not square
    svg = f'<svg xmlns="http://www.w3.org/2000/svg" {size}>{body}</svg>'
    png = resvg_py.svg_to_bytes(svg_string=svg, background="#ffffff")
    return Image.open(io.BytesIO(bytes(png))).convert("RGB")


def to_png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def write_shards(folder: Path, names: list[str], preferred: dict[str, bytes], other: dict[str, bytes]) -> None:
    """Shards in the public layout of Pick-a-Pic's tars, image 0 or 1 preferred at random."""
    folder.mkdir(parents=True, exist_ok=True)
    coin = random.Random(SEED)
    for first in range(0, len(names), PAIRS_PER_SHARD):
        with wds.TarWriter(str(folder / f"{first // PAIRS_PER_SHARD:05d}.tar"), mtime=0) as writer:
            for name in names[first : first + PAIRS_PER_SHARD]:
                label_0 = coin.randint(0, 1)
                images = (preferred[name], other[name]) if label_0 else (other[name], preferred[name])
                writer.write(
                    {
                        "__key__": name,
                        "jpg_0.png": images[0],
                        "jpg_1.png": images[1],
                        "label_0.txt": str(label_0),
                        "label_1.txt": str(1 - label_0),
                        "caption.txt": name.replace("-", " "),
                    }
                )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--packages", type=Path, required=True, help="folder with the three npm tarballs")
    parser.add_argument("--concepts", type=Path, default=Path(__file__).with_name("concepts.txt"))
    parser.add_argument("--output", type=Path, required=True, help="folder for the shards")
    arguments = parser.parse_args()

    names = arguments.concepts.read_text().split()
    random.Random(SEED).shuffle(names)
    splits = {"held_out": names[:HELD_OUT], "train": names[HELD_OUT:]}
    icons = {style: load_icons(arguments.packages, package) for style, package in STYLES.items()}
    images = {style: {name: to_png(render(icons[style][name])) for name in names} for style in STYLES}
    for preferred, other in PREFERENCES:
        for split, members in splits.items():
            folder = arguments.output / f"{preferred}-over-{other}" / split
            write_shards(folder, members, images[preferred], images[other])
            print(f"{folder}: {len(members)} pairs")


if __name__ == "__main__":
    main()
