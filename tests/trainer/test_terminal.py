"""Untrusted text reaches the terminal without control characters, secrets do not reach it, and signals end cleanly."""

from __future__ import annotations

import importlib
import io
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import HUNG, ROOT, environment
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


def test_a_console_makes_no_emoji_of_a_name(capsys: pytest.CaptureFixture[str]) -> None:
    Console(stderr=True).error("wds/0.tar:a: no caption")
    assert capsys.readouterr().err == "error: wds/0.tar:a: no caption\n"


def test_whatever_prints_is_guarded(capsys: pytest.CaptureFixture[str]) -> None:
    with guarded():
        print("a\x1b[2Jb", file=sys.stderr)
        sys.stderr.write("\r50%")  # a bar of a library
        print("http://me:HUSH@h/")
        Console(stderr=True).error("c\x1b[2Jd")
    output = capsys.readouterr()
    assert output.err == "a\\x1b[2Jb\n\r50%error: c\\x1b[2Jd\n"
    assert output.out == "http://***@h/\n"


WRITING = """
import sys, time
from trainer.atomic import replacing
from trainer.terminal import guarded

@guarded()
def outer():
    inner()

@guarded()
def inner():
    with replacing("file") as file:
        file.write(b"half")
        print("ready", flush=True)
        time.sleep(600)

outer()
"""


@pytest.mark.parametrize(
    ("number", "status", "line"),
    [
        (signal.SIGTERM, 143, "interrupted by SIGTERM\n"),
        (signal.SIGINT, 130, "interrupted by Ctrl-C\n"),
    ],
)
def test_a_signal_ends_a_command_with_a_line_and_leaves_no_part(
    tmp_path: Path, number: signal.Signals, status: int, line: str
) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", WRITING], cwd=tmp_path, env=environment(), text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    ) as command:  # fmt: skip
        assert command.stdout is not None
        assert command.stdout.readline() == "ready\n"
        assert len(list(tmp_path.iterdir())) == 1
        command.send_signal(number)
        _, output = command.communicate(timeout=HUNG)
    assert (command.returncode, output) == (status, line)
    assert not list(tmp_path.iterdir())


FORKING = """
import os, signal
from trainer.terminal import guarded

with guarded():
    receiver, sender = os.pipe()  # Python forgets signals that arrive before the fork has returned in the child
    child = os.fork()
    if child == 0:
        os.write(sender, b"ready")
        while True:
            signal.pause()
    os.read(receiver, 5)
    os.kill(child, signal.SIGTERM)
    print(os.WTERMSIG(os.waitpid(child, 0)[1]))
print(signal.getsignal(signal.SIGTERM) is signal.SIG_DFL)
"""


def test_a_child_of_a_command_dies_of_sigterm_without_a_line() -> None:
    argv = [sys.executable, "-c", FORKING]
    done = subprocess.run(argv, env=environment(), capture_output=True, text=True, timeout=HUNG)
    assert (done.stdout, done.stderr) == (f"{signal.SIGTERM.value}\nTrue\n", "")


PROCESSES = {
    "pipeline.demo.scorer", "pipeline.demo.truth", "pipeline.fetch.img2dataset_engine", "pipeline.fetch.sandbox",
    "pipeline.scheduler.isolation", "pipeline.scheduler.keeper", "pipeline.study.worker",
}  # fmt: skip
"""Modules that are started by other commands, or make what the demo ships."""


def test_every_command_is_guarded() -> None:
    commands = {
        re.sub(r"\.__main__$", "", str(path.relative_to(ROOT).with_suffix("")).replace("/", ".")): path
        for package in ("pipeline", "trainer")
        for path in (ROOT / package).rglob("*.py")
        if '__name__ == "__main__"' in path.read_text(encoding="utf-8")
    }
    assert len(commands) > len(PROCESSES) > 0
    for name in sorted(commands.keys() - PROCESSES):
        module = importlib.import_module(name if commands[name].stem != "__main__" else f"{name}.__main__")
        assert hasattr(module.main, "__wrapped__"), f"{name}: main lacks @entry_point or @guarded()"
