"""A conversation to a sample: rendered by the processor's own template, labelled where it trains.

What trains is what the template marks as generated, which should be the assistant's turns; the stop
token right behind a marked turn trains too, since a model that never learns it never stops
(axolotl#3756). Pictures, sounds, videos and their begin and end tokens never do.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .errors import Refused
from .loss import IGNORED
from .model_facts import TYPE_ID_NAMES

_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")
_PER_TOKEN = ("input_ids", "attention_mask", "assistant_masks", *TYPE_ID_NAMES)
_PICTURE_KEYS = ("image", "path", "url")
# Named tokens of tokenizers and processors that stand for a medium or for one of its ends.
_MEDIA = (
    *("image", "boi", "eoi", "video", "audio", "boa", "eoa"),
    *("vision_start", "vision_end", "vision_bos", "vision_eos"),
)


def chat_sample(
    processor: Any, messages: Sequence[Mapping[str, Any]], index: int = 0
) -> dict[str, Tensor]:
    """One conversation as `input_ids` and `labels` (length,), with the processor's type ids and
    features.

    processor: a processor, or a tokenizer alone. messages: role and content each; content is text
    or parts (`{"type": "text" | "image" | "audio" | "video", ...}`). index: names it in errors.
    Raises Refused, naming the conversation, for a template that marks nothing, a picture that
    cannot be read, and placeholders that the pictures, videos and sounds do not match.
    """
    require_marks(processor, index)
    ready = [_opened(message, index) for message in messages]
    try:
        rendered = _rendered(processor, ready)
    except Refused:
        raise
    except (ValueError, TypeError, KeyError, OSError, IndexError, StopIteration) as error:
        what = str(error).strip() or type(error).__name__
        raise Refused(f"conversation {index}: {what.splitlines()[0]}") from error
    ids = rendered.pop("input_ids").long()
    mask = rendered.pop("assistant_masks").bool()
    rendered.pop("attention_mask", None)
    if any(m["role"] == "assistant" for m in messages) and not bool(mask.any()):
        raise Refused(f"conversation {index}: no token of its assistant's turns is marked to train")
    labels = trained_labels(ids, mask, processor)
    return {"input_ids": ids, "labels": labels, **rendered}


def require_marks(processor: Any, index: int = 0) -> None:
    """Refused where the chat template has no `{% generation %}`: nothing at all would train."""
    template = getattr(processor, "chat_template", None)
    if isinstance(template, Mapping):
        template = template.get("default")
    if template is None:
        raise Refused(f"conversation {index}: the processor has no chat template")
    if not _MARK.search(template):
        raise Refused(
            f"conversation {index}: the chat template does not mark the assistant's turns; put"
            " {% generation %} before and {% endgeneration %} after them"
        )


def trained_labels(ids: Tensor, mask: Tensor, processor: Any) -> Tensor:
    """Labels (length,) of tokens (length,): the marked ones, and a stop token right behind them.

    A stop token is a special token that is no medium's; nothing of a medium is labelled, marked or
    not.
    """
    tokenizer = getattr(processor, "tokenizer", processor)
    media = media_ids(processor)
    special = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    behind = torch.zeros_like(mask)
    behind[1:] = mask[:-1] & ~mask[1:]
    # a turn that was marked up to its stop token and including it has nothing to add
    ended = torch.zeros_like(mask)
    ended[1:] = torch.isin(ids[:-1], torch.tensor(sorted(special - media)))
    stops = behind & ~ended & torch.isin(ids, torch.tensor(sorted(special - media)))
    labels = ids.masked_fill(~(mask | stops), IGNORED)
    return labels.masked_fill(torch.isin(ids, torch.tensor(sorted(media))), IGNORED)


def media_ids(processor: Any) -> frozenset[int]:
    """Ids of padding, pictures, videos and sounds, and of what begins and ends them."""
    tokenizer = getattr(processor, "tokenizer", processor)
    found = {tokenizer.pad_token_id}
    for name in _MEDIA:
        for owner in (processor, tokenizer):
            token = getattr(owner, f"{name}_token", None)
            if token is not None:
                found.add(tokenizer.convert_tokens_to_ids(str(token)))
    return frozenset(i for i in found if i is not None)


def _rendered(processor: Any, messages: list[dict[str, Any]]) -> dict[str, Tensor]:
    """What the template gives, without a batch dimension where it is per token."""
    found = processor.apply_chat_template(
        messages,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        return_assistant_tokens_mask=True,
    )
    length = torch.as_tensor(found["input_ids"]).shape[-1]
    kept = {}
    for name, value in found.items():
        tensor = torch.as_tensor(value)
        per_token = tensor.dim() == 2 and tensor.shape[0] == 1 and tensor.shape[1] == length
        kept[name] = tensor[0] if per_token and name in _PER_TOKEN else tensor
    return kept


def _opened(message: Mapping[str, Any], index: int) -> dict[str, Any]:
    """The message with its pictures decoded, which Pillow otherwise leaves for much later."""
    content = message["content"]
    if isinstance(content, str):
        return {**message, "content": [{"type": "text", "text": content}]}
    return {**message, "content": [_decoded(part, index) for part in content]}


def _decoded(part: Mapping[str, Any], index: int) -> dict[str, Any]:
    from PIL import Image

    if part.get("type") != "image":
        return dict(part)
    key = next((k for k in _PICTURE_KEYS if k in part), None)
    source = part.get(key) if key else None
    if isinstance(source, str | Path) and not str(source).startswith(("http", "data:")):
        try:
            with Image.open(source) as image:
                image.load()
                source = image.copy()
        except (OSError, SyntaxError) as error:
            raise Refused(
                f"conversation {index}: picture {source} cannot be read: {error}"
            ) from error
    elif isinstance(source, Image.Image):
        try:
            source.load()
        except OSError as error:
            raise Refused(f"conversation {index}: a picture cannot be read: {error}") from error
    kept = {k: v for k, v in part.items() if k not in _PICTURE_KEYS}
    return {**kept, "image": source} if key else kept
