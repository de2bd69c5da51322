"""Captions: characters that nobody sees, and the length that CLIP reads."""

import re

CLIP_TOKENS = 75  # of a caption that CLIP's text encoders read, without the first and the last of their 77
# Byte order marks, spaces without width, marks of direction, soft hyphens, and control characters but white space. Kept
# are the joiners of emoji and of Persian, and variation selectors.
INVISIBLE = re.compile("[\ufeff\u200b\u200e\u200f\u202a-\u202e\u2060-\u2069\u00ad\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f]")
CJK = "\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af"  # of which CLIP reads every character as one token or more
PIECES = re.compile(rf"'(?:s|t|re|ve|m|ll|d)\b|[{CJK}]|[^\W\d_{CJK}]+|\d|[^\s\w]+|_+", re.IGNORECASE)


def clean_caption(text: str) -> str:
    """Remove what nobody sees, which a tokenizer would read as further tokens, and white space around the rest."""
    return INVISIBLE.sub("", text).strip()


def is_surely_cut(caption: str) -> bool:
    """Whether a caption has more words, digits and groups of signs than CLIP reads tokens; each takes at least one."""
    return len(caption) > CLIP_TOKENS and sum(1 for _ in PIECES.finditer(caption)) > CLIP_TOKENS
