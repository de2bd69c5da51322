"""Captions: what nobody sees goes, what is too long for CLIP is counted."""

from lit_align.common.captions import clean_caption, is_surely_cut


def test_invisible_characters_go_and_joiners_stay():
    assert clean_caption("\ufeffa\u200b red\u2060 fox\x00\u200e \n") == "a red fox"
    for kept in ("👩\u200d🚀", "\u0645\u06cc\u200c\u062e", "❤\ufe0f", "two\nlines", "tab\there", "café", "cafe\u0301"):
        assert clean_caption(kept) == kept


def test_long_captions():
    assert not is_surely_cut("word " * 75)
    assert is_surely_cut("word " * 76)
    assert is_surely_cut("\u72d0" * 76)
    assert is_surely_cut("1" * 76)  # each digit is a token
    assert not is_surely_cut("a" * 500)  # perhaps, but not surely
    assert is_surely_cut("it's, " * 26)
