"""Pictures of a conversation, decoded before anything is made of them.

Pillow reads a file's head at first and the rest when it must: a truncated file is then an error
deep inside a processor, which no longer knows whose picture it was.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .errors import Refused

_KEYS = ("image", "path", "url")


def opened(message: Mapping[str, Any], index: int) -> dict[str, Any]:
    """The message with its content as parts and its pictures decoded.

    index: of the conversation, for errors. Raises Refused, naming conversation and file.
    """
    content = message["content"]
    if isinstance(content, str):
        return {**message, "content": [{"type": "text", "text": content}]}
    return {**message, "content": [decoded(part, index) for part in content]}


def decoded(part: Mapping[str, Any], index: int) -> dict[str, Any]:
    """A part with its picture as a loaded `PIL.Image`; other parts, and addresses, as they are."""
    from PIL import Image

    key = next((k for k in _KEYS if k in part), None)
    if part.get("type") != "image" or key is None:
        return dict(part)
    source = part[key]
    if isinstance(source, str) and source.startswith(("http://", "https://", "data:")):
        return dict(part)
    try:
        if isinstance(source, str | Path):
            with Image.open(source) as image:
                image.load()
                source = image.copy()
        elif isinstance(source, Image.Image):
            source.load()
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        named = f"picture {source}" if isinstance(source, str | Path) else "a picture"
        raise Refused(f"conversation {index}: {named} cannot be read: {error}") from error
    return {**{k: v for k, v in part.items() if k not in _KEYS}, "image": source}
