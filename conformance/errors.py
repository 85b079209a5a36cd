"""The one exception that a user's mistake becomes: shown as one line, exit status 2."""

from __future__ import annotations


class InputError(Exception):
    """What the user gave cannot be used; the message is one line saying what and where."""
