from __future__ import annotations

import time

import pytest

from pipeline.filters.caption_pattern import CaptionPattern
from tests.tables import check_filter, make_batch, run_step

BOILERPLATE = {
    "no_letters": ["", "   ", "12", "3.14", "12/03/2014", "★★★☆☆", "1920 × 1080", "$9.99", "🐈🐈"],
    "camera_name": [
        "IMG_2187.jpg",
        "IMG_2187",
        "img 2187 (2).JPG",
        "DSC0042",
        "_DSC0042-300x200",
        "DSCN0042.JPG",
        "P1010023",
        "PXL_20210101_101010123",
        "image001.png",
        "Photo 12.jpeg",
        "Screenshot 2020-01-31 at 10.15.00 PM",
        "WhatsApp Image 2020-01-31 at 10.15.00.jpeg",
        "DJI_0001 copy",
    ],
    "file_name": ["red-vase_02.jpg", "File:Solomon_Islands.PNG", "Name: abc_0294.jpg", "products/vase.webp"],
    "hash": ["d41d8cd98f00b204e9800998ecf8427e", "123E4567-E89B-12D3-A456-426614174000"],
    "date": [
        "12 March 2014",
        "Mar. 12th, 2014 at 10:15 pm",
        "Monday, March 12",
        "March 2014",
        "3rd of May",
        "2014-03-12T10:15:00Z",
    ],
    "url": ["https://example.org/a?b=c", "www.example.org"],
    "placeholder": [
        "image",
        "Photo",
        "[image]",
        "photo 12",
        "Picture #3",
        "Photo 3 of 12",
        "logo",
        "Company Logo",
        "thumbnail",
        "Untitled-1",
        "[no title]",
        "No image available.",
        "Sorry, no photo available yet!",
        "Image coming soon",
        "Cover image",
        "stock photo",
        "Figure 2",
        "null",
        "Image may contain:",
    ],
    "interface": [
        "click to enlarge",
        "Click here to view full-size image",
        "click image for larger version",
        "Enlarge",
        "View larger image",
        "Follow us on Twitter",
        "FOLLOW US BY EMAIL",
        "Share this",
        "Add to cart",
        "Read more »",
    ],
    "markup": ["<br/>", "{{ product.title }}", "%title%", "&lt;br/&gt;", "&amp;nbsp;", "<img src='a.jpg'"],
}

CAPTIONS = [
    "Red vase, click to enlarge",
    "Logo of the Red Cross",
    "a picture of a cellphone on a cellphone",
    "Image of a dog catching a ball",
    "stock photo of a smiling woman",
    "Photo 51, the X-ray image of DNA",
    "Red vase on a table.jpg",
    "IMGA_41229 M31 Andromeda Galaxy camera focus test",
    "Market day in May",
    "April",
    "March of the Penguins",
    "May 1968: students march through Paris",
    "View of Delft",
    "View from the bridge",
    "Open door",
    "A blank canvas",
    "Print of a hare by Dürer",
    "I ♥ NY",
    "M31",
    "9 lives",
    "P51 Mustang",
    "hitachi-solutions.jp",
    "The cover of the book",
    "Close friends",
    "Zoom Focus Mini LED Flashlight",
    "<b>Game 20: at Denver 109, Clippers 104</b>",
    "Ein Hund läuft durch den Schnee",
    "草地上的狗",
    "собака на траве",
]


@pytest.mark.parametrize("reason", BOILERPLATE)
def test_boilerplate_is_dropped_by_class(reason: str) -> None:
    captions = BOILERPLATE[reason]
    check_filter(CaptionPattern(), [{"caption": c} for c in captions], [reason] * len(captions))


def test_captions_are_kept() -> None:
    check_filter(CaptionPattern(), [{"caption": c} for c in CAPTIONS], [None] * len(CAPTIONS))


def test_custom_patterns_match_anywhere_and_appear_in_the_detail() -> None:
    step = CaptionPattern(patterns=[r"\bACME Corp\b", "^ebay"])
    rows = [{"caption": c} for c in ("A chair by acme corp", "My ebay find", "eBay find", "photo 12")]
    check_filter(step, rows, ["custom", None, "custom", "placeholder"])
    _, drops = run_step(step, make_batch(rows))
    assert drops["detail"].to_pylist() == [r"\bACME Corp\b", "^ebay", None]


def test_without_defaults_only_custom_patterns_apply() -> None:
    rows = [{"caption": "photo 12"}, {"caption": "ACME"}]
    check_filter(CaptionPattern(defaults=False, patterns=["acme"]), rows, [None, "custom"])


def test_a_missing_caption() -> None:
    check_filter(CaptionPattern(), [{"caption": None}], ["no_letters"])


def test_no_caption_can_make_the_patterns_backtrack() -> None:
    hostile = [
        "a" * 50_000 + "!",
        "photo " * 10_000 + "x",
        "1 " * 30_000 + "x",
        "b" + "<" * 50_000,
        "click to " * 6_000 + "x",
    ]
    start = time.process_time()
    check_filter(CaptionPattern(), [{"caption": c} for c in hostile], [None, None, None, None, None])
    assert time.process_time() - start < 10


@pytest.mark.parametrize("options", [{"patterns": ["("]}, {"patterns": [r"(?<=a)b"]}, {"defaults": False}])
def test_invalid_options_are_reported(options: dict) -> None:
    assert [key for key, _ in CaptionPattern(**options).check()] == ["patterns"]
