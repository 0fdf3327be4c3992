"""Normalises captions for comparison and counting. The stored caption is never changed."""

from __future__ import annotations

import html
from collections.abc import Callable

import pyarrow as pa
import pyarrow.compute as pc

# Scripts without spaces between words. Their words are counted by mean length: two characters for Chinese and Japanese,
# four for the alphasyllabaries, where vowel signs count as characters.
_SHORT = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Bopomofo}\x{30FC}"  # U+30FC lengthens a vowel, but is Common by script
_LONG = r"\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}\p{Tibetan}"
# Ideographic punctuation separates words, like a space.
_SPACE = r"\s\p{Z}\x{3000}-\x{303F}\x{30FB}"
# Adjacent punctuation is part of a word, as in scripts with spaces.
_MARKS = r"[\p{P}\p{S}]*"
_WORD = (
    rf"{_MARKS}[{_SHORT}]{{1,2}}{_MARKS}|{_MARKS}[{_LONG}]{{1,4}}{_MARKS}"
    rf"|[^{_SPACE}{_SHORT}{_LONG}]+"
)
UNSPACED = rf"[{_SHORT}{_LONG}]"
"""RE2 for a character of a script without spaces between words."""


def normal(captions: pa.Array | pa.ChunkedArray) -> pa.Array:
    """Normalises each caption to one line of plain Unicode text; "" for null.

    In this order: decodes HTML entities once (`&amp;` becomes `&`); removes invisible format characters (category Cf:
    zero-width spaces, soft hyphens, direction marks); applies NFKC (full-width and mathematical letters, ligatures);
    collapses runs of white space and control characters to one space and trims both ends. Invalid UTF-8 becomes U+FFFD.
    Case is kept.
    """
    text = pc.fill_null(_valid(captions), "")
    with_entities = pc.match_substring(text, "&")
    if pc.any(with_entities).as_py():
        # Arrow has no function for this, and few captions need it.
        decoded = [html.unescape(caption) for caption in text.filter(with_entities).to_pylist()]
        text = pc.replace_with_mask(text, with_entities, pa.array(decoded, pa.string()))
    text = beyond_ascii(text, lambda t: pc.utf8_normalize(pc.replace_substring_regex(t, r"\p{Cf}+", ""), "NFKC"))
    return pc.utf8_trim(pc.replace_substring_regex(text, r"[\s\p{Z}\p{Cc}]+", " "), " ")


def beyond_ascii(texts: pa.Array, change: Callable[[pa.Array], pa.Array]) -> pa.Array:
    """Applies `change`, which must not affect pure ASCII, to the other texts.

    Most captions of most pools are pure ASCII, and regular expressions with Unicode classes are slow.
    """
    other = pc.invert(pc.string_is_ascii(texts))
    return pc.replace_with_mask(texts, other, change(texts.filter(other)))


def words(texts: pa.Array) -> pa.Array:
    """The number of words in each normal caption, as int32.

    Words are separated by white space. In scripts without spaces between words, every two characters (Chinese,
    Japanese) or four (Thai, Lao, Khmer, Burmese, Tibetan) count as one word.
    """
    return pc.count_substring_regex(texts, _WORD)


def _valid(captions: pa.Array | pa.ChunkedArray) -> pa.Array:
    """One array of valid UTF-8. An invalid caption must not fail its batch."""
    array = captions.combine_chunks() if isinstance(captions, pa.ChunkedArray) else captions
    raw = array.cast(pa.binary())
    try:
        return raw.cast(pa.string())  # Arrow validates when casting from binary
    except pa.ArrowInvalid:
        return pa.array([None if b is None else b.decode("utf-8", "replace") for b in raw.to_pylist()], pa.string())
