"""How every step reads a caption before it judges it; the stored caption is never changed."""

from __future__ import annotations

import html

import pyarrow as pa
import pyarrow.compute as pc

# Scripts written without spaces. A word is counted for every so many of their characters, which is about the mean
# length of a word there: two for Chinese and Japanese, four for the alphasyllabaries, whose vowel signs count too.
_SHORT = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Bopomofo}\x{30FC}"  # U+30FC lengthens a vowel, but is Common by script
_LONG = r"\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}\p{Tibetan}"
# Ideographic punctuation stands between words as a space does elsewhere.
_SPACE = r"\s\p{Z}\x{3000}-\x{303F}\x{30FB}"
# Punctuation that touches such a word is part of it, as it is in scripts with spaces.
_MARKS = r"[\p{P}\p{S}]*"
_WORD = (
    rf"{_MARKS}[{_SHORT}]{{1,2}}{_MARKS}|{_MARKS}[{_LONG}]{{1,4}}{_MARKS}"
    rf"|[^{_SPACE}{_SHORT}{_LONG}]+"
)
UNSPACED = rf"[{_SHORT}{_LONG}]"
"""RE2: a character of a script that puts no space between words."""


def normal(captions: pa.Array | pa.ChunkedArray) -> pa.Array:
    """Each caption as one line of plain Unicode text, "" for null.

    In this order: HTML entities are decoded once (`&amp;` is `&`), characters that nobody sees are removed (Unicode's
    format characters, category Cf: zero-width spaces, soft hyphens, marks of direction), compatibility forms become the
    letters they stand for (NFKC: full-width, mathematical, ligatures), and runs of white space and control characters
    become one space, with none at either end. Bytes that are not UTF-8 become U+FFFD. Case is kept.
    """
    text = pc.fill_null(_valid(captions), "")
    with_entities = pc.match_substring(text, "&")
    if pc.any(with_entities).as_py():
        # Arrow has no function for it, and few captions need it.
        decoded = [html.unescape(caption) for caption in text.filter(with_entities).to_pylist()]
        text = pc.replace_with_mask(text, with_entities, pa.array(decoded, pa.string()))
    text = pc.utf8_normalize(pc.replace_substring_regex(text, r"\p{Cf}+", ""), "NFKC")
    return pc.utf8_trim(pc.replace_substring_regex(text, r"[\s\p{Z}\p{Cc}]+", " "), " ")


def words(texts: pa.Array) -> pa.Array:
    """The number of words in each normal caption, as int32.

    Words are what white space divides. In scripts without spaces between words, every two characters (Chinese,
    Japanese) or every four (Thai, Lao, Khmer, Burmese, Tibetan) count as one.
    """
    return pc.count_substring_regex(texts, _WORD)


def _valid(captions: pa.Array | pa.ChunkedArray) -> pa.Array:
    """As one array of valid UTF-8: one caption that is not must not fail its batch."""
    array = captions.combine_chunks() if isinstance(captions, pa.ChunkedArray) else captions
    raw = array.cast(pa.binary())
    try:
        return raw.cast(pa.string())  # from binary, Arrow validates
    except pa.ArrowInvalid:
        return pa.array([None if b is None else b.decode("utf-8", "replace") for b in raw.to_pylist()], pa.string())
