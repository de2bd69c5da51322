"""Captions that are longer than the text encoder reads are counted and said."""

import logging

from transformers import CLIPTokenizer

from lit_align.backbones.caption_lengths import tokenize
from tests.support.paths import ROOT


def test_cut_captions_are_counted(caplog):
    tokenizer = CLIPTokenizer.from_pretrained(ROOT / "assets/emoji/pipeline/tokenizer")
    limit = tokenizer.model_max_length
    fits = "a " * (limit - 2)
    with caplog.at_level(logging.WARNING):
        assert tokenize(tokenizer, ["fox", fits]).shape == (2, limit)
        assert caplog.messages == []
        tokenize(tokenizer, ["fox", f"{fits}a a a"])
        tokenize(tokenizer, [f"{fits}a"])
        tokenize(tokenizer, [f"{fits}a"] * 10)
        other = CLIPTokenizer.from_pretrained(ROOT / "assets/emoji/pipeline/tokenizer_2")
        tokenize(other, ["fox", fits])
        tokenize(other, ["fox", f"{fits}a a a"])  # SDXL's second tokenizer repeats no line
    said = f"captions so far are longer than the {limit} tokens that the text encoder reads (longest: {limit + 3})"
    assert [message.split(";")[0] for message in caplog.messages] == [f"1 of 4 {said}", f"12 of 15 {said}"]
