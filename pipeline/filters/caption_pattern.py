from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.step import Estimate, Filter
from pipeline.text.caption import normal


def _any(words: str) -> str:
    """An alternation of the white-space-separated expressions."""
    return f"(?:{'|'.join(words.split())})"


_MARKS = r"[^\p{L}\p{N}%]*"  # not \W, which in RE2 includes all non-ASCII letters
_FILE_TYPE = r"\.(?:jpe?g|jfif|png|gif|webp|avif|heic|bmp|tiff?|svg|cr2|nef|psd|mp4|mov|pdf|html?|php|aspx?)"
_PICTURE = _any(
    "images? imgs? photos? photographs? pictures? pics? thumbnails? thumbs? graphics? logo icon avatar banner"
)
_CAMERA = _any(
    r"_?img[a-e]? _?mg _?dsc[fnt]? dji gopr imgp cimg pict pxl mvc mvimg hpim sam kif wp dcp fb_img burst pano p"
)
_CAPTURE = _any(r"screen\s?shots? whatsapp\simage snapchat scan clip\s?image capture")
# Suffixes added by copies, re-uploads and content systems: "(2)", "-1", " copy", "_edited", "-300x200", "@2x".
_SUFFIX = _any(r"\(\d+\) \d+ copy edit(?:ed)? final web small large scaled cropped rotated hdr e\d+ \d+x\d+ @\dx")
_MONTH = _any(
    """jan(?:uary)? feb(?:ruary)? mar(?:ch)? apr(?:il)? may june? july? aug(?:ust)? sept?(?:ember)? oct(?:ober)?
    nov(?:ember)? dec(?:ember)?"""
)
_WEEKDAY = _any("mon tues? wed(?:nes)? thu(?:rs)? fri sat(?:ur)? sun") + "(?:day)?"
_DAY = r"\d{1,2}(?:st|nd|rd|th)?"
_TIME = r"\d{1,2}[:.]\d{2}(?:[:.]\d{2})?\s*(?:[ap]\.?m\.?)?"
_WHICH = _any(
    "the this no missing sorry site website company brand header main profile cover featured product default stock"
)
_STATE = _any(
    "is not no yet available unavailable found missing coming soon provided here text placeholder may contain"
)
_COMMAND = _any(
    """click tap press hover roll-?over mouse-?over enlarge view show see open zoom expand download print share save
    tweet pin follow subscribe e?-?mail send add skip read learn sign buy shop"""
)
_OBJECT = _any(
    """here on over in out up to for and with by via a an the this it its all us me more now view see get open zoom
    enlarge expand download details? info information version full large larger bigger actual original high hi size
    sized res resolution screen slideshow gallery friends? page post article content cart wishlist e?-?mail facebook
    twitter pinterest instagram linkedin google youtube tumblr reddit"""
)

# Each expression must match the whole caption, so "Red vase, click to enlarge" and "Logo of the Red Cross" are kept:
# keeping a poor caption is better than losing a true one. RE2 runs in linear time.
DEFAULTS = {
    # No letters of any script: numbers, sizes, prices, numeric dates, rows of stars, emoji.
    "no_letters": r"\P{L}*",
    # Names given by cameras, phones and programs: IMG_2187, DSC0042 (2).jpg, P1010023, PXL_20210101_101010,
    # image001.png, Screenshot 2020-01-31 at 10.15.00 PM. "Photo 12" is a placeholder below.
    "camera_name": (
        rf"{_CAMERA}[\s_-]*\d{{3,}}(?:[\s_-]*{_SUFFIX})*(?:{_FILE_TYPE})?"
        rf"|{_PICTURE}(?:[\s_-]*{_SUFFIX})*{_FILE_TYPE}"
        rf"|{_CAPTURE}[\s_-]*\d(?:[\d\s_.,:()-]|at|[ap]m)*(?:{_FILE_TYPE})?"
    ),
    # One word with a file extension: red-vase_02.jpg. With spaces it may be a caption: "Red vase on a table.jpg".
    "file_name": rf"(?:(?:file\s?)?(?:name)?:\s*)?\S+{_FILE_TYPE}",
    # Identifiers: hexadecimal digests and UUIDs.
    "hash": r"[0-9a-f]{16,}|[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}",
    # 12 March 2014; Mar. 12th, 2014 at 10:15 pm; Monday, March 12; March 2014; 2014-03-12T10:15:00Z. A month alone does
    # not count: April and May are also first names.
    "date": (
        rf"(?:{_WEEKDAY}[.,]?\s*)?(?:{_DAY}[\s.,/-]*(?:of\s+)?{_MONTH}|{_MONTH}[\s.,/-]*(?:{_DAY}|\d{{4}}))"
        rf"(?:[\s.,/-]+\d{{2,4}})?(?:[\s,]*(?:at\s+)?{_TIME})?"
        r"|\d{4}-\d{2}-\d{2}t[\d:.]+(?:z|[+-][\d:]+)?"
    ),
    # A bare URL.
    "url": r"(?:https?://|www\.)\S+",
    # Text that says only that a picture exists or is missing, possibly bracketed or numbered: "image", "[no title]",
    # "Photo 3 of 12", "Sorry, no image available", "company logo", "Figure 2".
    "placeholder": (
        rf"{_MARKS}(?:{_WHICH}[\s,_-]+)*(?:{_PICTURE}|untitled|title|blank|cover|preview|attachment|spacer|null|none|undefined"
        rf"|n/a|alt|fig(?:ure)?\.?\s*\d)(?:[\s_-]+(?:{_STATE}|{_PICTURE}))*(?:[\s_-]*(?:no\.?|number|of)?[\s#/]*\d+)*{_MARKS}"
    ),
    # Buttons and hints: "Click here to enlarge", "View full-size image", "Follow us on Twitter".
    "interface": rf"(?:please )?(?:{_COMMAND}(?:[\s-]+(?:{_OBJECT}|{_PICTURE}))+|enlarge|zoom|next|previous){_MARKS}",
    # Only mark-up or unfilled templates: "<br/>", "{{ product.title }}", "%alt%".
    "markup": (
        r"(?:<[a-z!/?%][^>]*>?|&[a-z]+;|\[/?(?:caption|img|url)[^\]]*\]"
        r"|\{\{[^}]*\}\}|\{%[^}]*%\}|\$\{[^}]*\}|%\w+%|\s)+"
    ),
}


@dataclass(kw_only=True)
class CaptionPattern(Filter):
    """Drops boilerplate captions. The reason is the class of the matching pattern (`camera_name`, `interface`, …).

    The built-in classes (`DEFAULTS`) match whole captions only. A pattern of the recipe matches anywhere, unless it is
    anchored with `^` and `$`; its reason is `custom`. Patterns match the normal caption
    (`pipeline.text.caption.normal`) and ignore case. They are RE2 (linear time; no look-around, no back-references).
    The built-in classes drop none of 35,000 captions written for photographs (COCO, Flickr8k) and 0.4% of 10,000 alt
    texts from the web.
    """

    defaults: bool = True
    """Use the built-in classes."""
    patterns: list[str] = field(default_factory=list)
    """Further regular expressions, for boilerplate of a particular pool."""

    needs = ("caption",)
    version = 2

    def estimate(self, rows: float) -> Estimate:
        return Estimate(0.97, 200_000, "keep assumed")

    def check(self) -> Iterator[tuple[str, str]]:
        for pattern in self.patterns:
            try:
                _matches(pa.array([""]), pattern)
            except pa.ArrowInvalid as e:
                yield "patterns", f"{pattern!r} is not an RE2 regular expression: {e}"
        if not self.defaults and not self.patterns:
            yield "patterns", "is empty and `defaults` is false, so nothing would be dropped"

    def fingerprint(self) -> object:
        return hashlib.sha256(repr(DEFAULTS).encode()).hexdigest() if self.defaults else None

    def judge(self, batch: pa.Table) -> pa.StringArray:
        """The class of each row's first match; null if the row is kept."""
        caption = normal(batch["caption"])
        classes = {name: rf"^(?:{pattern})$" for name, pattern in DEFAULTS.items()} if self.defaults else {}
        found = [(name, _matches(caption, pattern)) for name, pattern in classes.items()]
        found += [("custom", _matches(caption, pattern)) for pattern in self.patterns]
        return pc.case_when(pc.make_struct(*(match for _, match in found)), *(pa.scalar(name) for name, _ in found))

    def detail(self, dropped: pa.Table) -> pa.StringArray:
        """The custom pattern that matched; null if a built-in class matched first."""
        caption, reason = normal(dropped["caption"]), self.judge(dropped)
        found = pa.nulls(len(dropped), pa.string())
        for pattern in reversed(self.patterns):
            match = pc.and_(pc.equal(reason, "custom"), _matches(caption, pattern))
            found = pc.if_else(match, pattern, found)
        return found


def _matches(caption: pa.StringArray, pattern: str) -> pa.BooleanArray:
    return pc.match_substring_regex(caption, pattern, ignore_case=True)
