"""Where the bundled model, its pairs and its scorers are."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
PIPELINE = ROOT / "assets/emoji/pipeline"
PAIRS = ROOT / "assets/emoji/pairs/high_contrast-over-color"
SCORERS = ROOT / "assets/emoji/scorers"
