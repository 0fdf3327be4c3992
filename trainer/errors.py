"""The base class of errors that the user can fix."""

from __future__ import annotations


class InputError(ValueError):
    """Wrong input: a configuration, an option, a file. Commands print the message and exit with status 2."""
