"""How the reference implementation declines."""

from __future__ import annotations


class Refused(ValueError):
    """The request would train wrongly or silently do nothing; the message is one line and says
    what is wrong, where, and what would be right.
    """


class ConfigError(ValueError):
    """A model config that cannot be read or planned for; the message is one line."""
