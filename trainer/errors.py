"""The errors that end a command with a line, and the fix for missing packages."""

from __future__ import annotations


class InputError(ValueError):
    """Wrong input: a configuration, an option, a file. Commands print the message and exit with status 2."""


class FailedError(Exception):
    """The input is right, but the work failed. Commands print the message and exit with status 1."""


def store_cure(url: str, error: BaseException) -> str:
    """The end of a message: how to install the extra that a URL's store needs; empty if no extra helps."""
    extra = {"s3": "s3", "gs": "gcs", "gcs": "gcs"}.get(url.partition("://")[0])
    return f"; pip install 'winnow-clip[{extra}]'" if extra and isinstance(error, ImportError) else ""
