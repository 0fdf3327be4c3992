"""Nothing from outside reaches the terminal with control characters, and no secret does at all."""

from __future__ import annotations

import io
import sys

import pytest

from trainer.terminal import Console, guarded, mask, masked, one_line, visible


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a plain line\twith a tab\n", "a plain line\twith a tab\n"),
        ("größer, 大きい, 🙂", "größer, 大きい, 🙂"),
        ("\x1b]0;title\x07", "\\x1b]0;title\\x07"),
        ("\x9b31m", "\\x9b31m"),
        ("back\x08\x7f\r", "back\\x08\\x7f\\x0d"),
        ("\u202egnp.exe\u2066", "\\u202egnp.exe\\u2066"),
        ("\u2028line", "\\u2028line"),
        ("\ud800", "\\ud800"),
    ],
)
def test_control_characters_are_shown_as_escapes(text: str, shown: str) -> None:
    assert visible(text) == shown


def test_a_name_cannot_pass_for_a_further_line() -> None:
    assert one_line("url\nerror: none") == "url\\nerror: none"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("http://h/pool.csv?page=2", "http://h/pool.csv?page=2"),
        ("mail me@h.example about s3://bucket/a", "mail me@h.example about s3://bucket/a"),
        ("http://me:HUSH@h/pool.csv", "http://***@h/pool.csv"),
        ("(s3://KEY:HU@SH@bucket/a, 2)", "(s3://***@bucket/a, 2)"),
        ("simplecache::http://me@h/p", "simplecache::http://***@h/p"),
        ("https://h/a?X-Amz-Signature=HUSH&b=1", "https://h/a?X-Amz-Signature=***&b=1"),
        ("url='https://h/a?b=1&sig=HUSH%3D'", "url='https://h/a?b=1&sig=***'"),
        ("https://h/a?access_token=HUSH#x", "https://h/a?access_token=***#x"),
        ("https://h/a?AWSAccessKeyId=HUSH;Signature=HUSH", "https://h/a?AWSAccessKeyId=***;Signature=***"),
    ],
)
def test_secrets_of_urls_are_masked(text: str, shown: str) -> None:
    assert mask(text) == shown


def test_values_of_secret_variables_are_masked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "HUSHHUSHHUSH")
    monkeypatch.setenv("WINNOW_SHORT_TOKEN", "a")
    assert mask("signed with HUSHHUSHHUSH: a failure") == "signed with ***: a failure"


def test_plain_data_is_masked_throughout() -> None:
    data = {"pool": {"path": ["http://me:HUSH@h/a", 3]}, "workers": None}
    assert masked(data) == {"pool": {"path": ["http://***@h/a", 3]}, "workers": None}


def test_a_console_passes_its_own_sequences_and_no_others() -> None:
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, color_system="standard", width=80)
    console.print("[red]fine\x1b[2J[/red] http://me:HUSH@h/", highlight=False)
    assert "\x1b[31mfine\\x1b[2J\x1b[0m" in out.getvalue()
    assert "HUSH" not in out.getvalue()


def test_whatever_prints_is_guarded(capsys: pytest.CaptureFixture[str]) -> None:
    with guarded():
        print("a\x1b[2Jb", file=sys.stderr)
        sys.stderr.write("\r50%")  # a bar of a library
        print("http://me:HUSH@h/")
        Console(stderr=True).error("c\x1b[2Jd")
    said = capsys.readouterr()
    assert said.err == "a\\x1b[2Jb\n\r50%error: c\\x1b[2Jd\n"
    assert said.out == "http://***@h/\n"
