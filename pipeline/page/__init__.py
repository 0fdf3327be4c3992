"""Renders pages: each is one HTML file that can be read without network, server or scripts.

Templates are Jinja2 templates with escaping always on. Charts are Vega-Lite specifications, plain dictionaries that are
short to write and to read. `vl_convert` draws them as SVG when the page is written, so a page has no plotting code. Its
Content-Security-Policy forbids all requests, and all scripts except the one of the shell, which switches themes.

All text from outside (captions, URLs, hosts, reasons) goes through `shown`, which makes hidden characters visible.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from trainer.terminal import mask, visible

FOLDER = Path(__file__).parent
TEXT = 400
"""Characters of a text that are shown; the rest, up to LONGEST, is folded."""
LONGEST = 4000
SIDE = 112
"""Longest side of a thumbnail in pixels."""
PAGE_BYTES = 15_000_000
"""Most bytes of a page. `Thumbnails` stops before it."""

# Characters that are invisible, or change how the text around them is displayed.
_HIDDEN = re.compile(
    "[\u00ad\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180e\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffc]"
)
_SURROGATE = re.compile("[\ud800-\udfff]")
_FIGURE = re.compile(r"–|[0-9][0-9.,]*( ?(%|[kMGT]?B|s|min|h|d))?")


def shown(text: object, limit: int = TEXT) -> Markup:
    """Renders text from outside as HTML: escaped, secrets masked, hidden characters visible, text direction isolated.

    The text beyond `limit` characters is folded; beyond LONGEST, it is left out with a note.
    """
    full = plain(text)
    if len(full) <= limit:
        return Markup("<bdi>{}</bdi>").format(full)
    rest = full[limit:LONGEST]
    left = f" … {len(full) - LONGEST:,} more characters" if len(full) > LONGEST else ""
    return Markup("<details class=long><summary><bdi>{}</bdi>…</summary><bdi>{}</bdi>{}</details>").format(
        full[:limit], rest, left
    )


def plain(text: object) -> str:
    """Makes text from outside safe to show: masks secrets, and makes hidden characters visible. None becomes empty."""
    valid = "" if text is None else _SURROGATE.sub("\ufffd", str(text))
    return visible(_HIDDEN.sub(lambda found: f"⟨U+{ord(found[0]):04X}⟩", mask(valid)))


def count(n: float) -> str:
    """Formats a number as 1,234, or with three digits as 12.3 if it has a fraction."""
    return f"{n:,.0f}" if float(n).is_integer() or abs(n) >= 1000 else f"{n:,.3g}"


def share(part: float, whole: float) -> str:
    """Formats part / whole as a percentage. One below 1% keeps two significant digits."""
    if not whole:
        return "–"
    percent = 100 * part / whole
    return f"{percent:.2g}%" if 0 < percent < 1 else f"{percent:.1f}%"


def size(n: float) -> str:
    """Formats bytes as 1.2 GB, with decimal units."""
    for unit, factor in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if n >= factor:
            return f"{n / factor:,.1f} {unit}"
    return f"{n:,.0f} B"


# --- Tables -----------------------------------------------------------------------------------------------------------


class Table(NamedTuple):
    """Columns and rows. A cell is text, a number, or None, which is shown as a dash."""

    columns: Sequence[str]
    rows: Sequence[Sequence[object]]
    caption: str = ""

    @property
    def figures(self) -> list[bool]:
        """For each column, whether all its cells are figures such as 12, 3.4% or 5 MB, which are aligned right."""
        return [
            all(cell is None or isinstance(cell, int | float) or _FIGURE.fullmatch(str(cell)) for cell in column)
            for column in zip(*self.rows)
        ] or [False] * len(self.columns)


# --- Charts -----------------------------------------------------------------------------------------------------------

# Placeholder colours. `chart` replaces each by a variable of the style sheet, so that charts follow the theme.
KEPT, DROPPED, CUT, OTHER, BAND = "#010101", "#020202", "#030303", "#040404", "#050505"
SERIES = [KEPT, OTHER, CUT, "#060606", "#070707", "#080808"]
_INK, _GRID = "#0a0a0a", "#0b0b0b"
_VARIABLES = {
    KEPT: "kept", DROPPED: "dropped", CUT: "cut", OTHER: "other", BAND: "band",
    "#060606": "series-4", "#070707": "series-5", "#080808": "series-6", _INK: "muted", _GRID: "line",
}  # fmt: skip
_CONFIG = {
    "background": None,
    "padding": 12,  # the browser's fonts may be wider than those of the layout
    "font": "system-ui, sans-serif",
    "view": {"stroke": None},
    "axis": {
        "labelColor": _INK, "titleColor": _INK, "domainColor": _GRID, "tickColor": _GRID, "gridColor": _GRID,
        "labelFontSize": 11, "titleFontSize": 12, "titleFontWeight": "normal", "labelLimit": 240,
    },
    "axisX": {"labelOverlap": "greedy", "labelSeparation": 14},
    "legend": {
        "labelColor": _INK, "titleColor": _INK, "labelFontSize": 12, "orient": "top", "title": None,
        "columnPadding": 18,
    },
    "text": {"color": _INK},
    "bar": {"color": KEPT},
    "line": {"color": KEPT, "strokeWidth": 2},
    "rule": {"color": CUT},
}  # fmt: skip
_VEGA_LITE = "5.21"


def chart(
    spec: Mapping[str, Any], summary: str, table: Table | None = None, width: int = 420, height: int = 180
) -> Markup:
    """Draws a Vega-Lite specification as an SVG figure that follows the theme and the available width.

    `summary`, one sentence, is the caption and the text alternative. `table` has the numbers, folded below the chart.
    """
    import vl_convert

    whole = {"width": width, "height": height, "config": _CONFIG, **spec}
    text = json.dumps(whole, default=float)  # float: NumPy's numbers
    svg = vl_convert.vegalite_to_svg(text, vl_version=_VEGA_LITE)
    # The library numbers clip paths across all charts of a process, but equal pages must have equal bytes.
    numbers = {name: f"c{hashlib.sha256(text.encode()).hexdigest()[:8]}-{i}"
               for i, name in enumerate(dict.fromkeys(re.findall(r'id="(clip\d+)"', svg)))}  # fmt: skip
    svg = re.sub(r"\bclip\d+\b", lambda found: numbers.get(found[0], found[0]), svg)
    svg = re.sub(r' (?:role|aria-[a-z]+|aria-roledescription)="[^"]*"', "", svg)  # the chart is described as a whole
    for colour, variable in _VARIABLES.items():
        svg = svg.replace(f'"{colour}"', f'"var(--{variable})"')
    wide = re.search(r'viewBox="0 0 ([0-9.]+) ', svg)
    assert wide is not None
    svg = re.sub(r'(<svg [^>]*?) width="[0-9.]+" height="[0-9.]+"', r"\1", svg, count=1)
    svg = svg.replace("<svg ", f'<svg role="img" aria-label="{escape(summary)}" style="max-width:{wide[1]}px" ', 1)
    body = Markup(svg)
    if table is not None:
        body += environment().get_template("table.html").module.folded(table)  # type: ignore[attr-defined]
    return Markup("<figure class=chart>{}<figcaption>{}</figcaption></figure>").format(body, summary)


# --- Pictures ---------------------------------------------------------------------------------------------------------


class Thumbnails:
    """Makes small JPEGs for a page until they reach `limit` bytes."""

    def __init__(self, limit: int = PAGE_BYTES * 2 // 3) -> None:
        self._left = limit

    def __call__(self, encoded: bytes | None) -> str | None:
        """Returns a `data:` URL of the picture; None if it cannot be decoded or the limit is reached."""
        from trainer.pictures import decode
        from trainer.shards import CorruptSampleError

        if encoded is None or self._left <= 0:
            return None
        try:
            image = decode(encoded, SIDE)
        except CorruptSampleError:
            return None
        image.thumbnail((SIDE, SIDE))
        file = io.BytesIO()
        image.save(file, "JPEG", quality=72, optimize=True)
        address = f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"
        self._left -= len(address)
        return address


class Picture(NamedTuple):
    """A sample as a page shows it."""

    address: str | None
    """From `Thumbnails`; None shows an empty frame."""
    caption: object
    notes: Sequence[object] = ()
    """Lines below the caption, such as a score or a reason."""


# --- The page ---------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def environment() -> Environment:
    """Loads the templates of this folder. Every value is escaped unless it is Markup."""
    loader = FileSystemLoader(FOLDER)
    made = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    made.filters |= {"shown": shown, "count": count}
    return made


def render(template: str, **values: object) -> bytes:
    """Renders a template that extends `shell.html`. Raises ValueError if the page exceeds PAGE_BYTES."""
    style, script = ((FOLDER / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    made = environment().get_template(template)
    page = made.render(policy=policy, style=Markup(style), script=Markup(script), **values).encode()
    if len(page) > PAGE_BYTES:
        raise ValueError(f"the page has {size(len(page))}, more than {size(PAGE_BYTES)}")
    return page
