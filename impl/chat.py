"""A conversation to a sample: rendered by the processor's own template, labelled where it trains.

What trains is what the template marks as generated, which should be the assistant's turns; the stop
token right behind a marked turn trains too, since a model that never learns it never stops
(axolotl#3756). Pictures, sounds, videos and their begin and end tokens never do.

Where a marked turn lies among the processor's tokens is counted here, from the turn tokens next to
it: transformers' own mask ignored until after 5.17 that pictures take more room than their
placeholders (axolotl#3592 had the same).
"""

from __future__ import annotations

import re
from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .errors import Refused
from .loss import IGNORED
from .model_facts import TYPE_ID_NAMES
from .pictures import opened

_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")
_PER_TOKEN = ("input_ids", "attention_mask", *TYPE_ID_NAMES)
# Named tokens of tokenizers and processors that stand for a medium or for one of its ends.
_MEDIA = (
    *("image", "boi", "eoi", "video", "audio", "boa", "eoa"),
    *("vision_start", "vision_end", "vision_bos", "vision_eos"),
)
_FAULTS = (ValueError, TypeError, KeyError, OSError, IndexError, StopIteration)


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
    template = marked_template(processor, index)
    ready = [opened(message, index) for message in messages]
    try:
        sample = _processed(processor, ready)
        text, marks = _marked(processor, template, ready)
    except _FAULTS as error:
        what = str(error).strip() or type(error).__name__
        raise Refused(f"conversation {index}: {what.splitlines()[0]}") from error
    _require_match(processor, text, ready, index)
    mask = _trained(processor, sample["input_ids"], text, marks, index)
    if any(m["role"] == "assistant" for m in messages) and not bool(mask.any()):
        raise Refused(f"conversation {index}: no token of its assistant's turns is marked to train")
    sample["labels"] = trained_labels(sample["input_ids"], mask, processor)
    return sample


def marked_template(processor: Any, index: int = 0) -> str:
    """The chat template. Refused where it has no `{% generation %}`: nothing at all would train."""
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
    return str(template)


def trained_labels(ids: Tensor, mask: Tensor, processor: Any) -> Tensor:
    """Labels (length,) of tokens (length,): the marked ones, and a stop token right behind them.

    A stop token is a special token that is no medium's; nothing of a medium is labelled, marked or
    not.
    """
    media = media_ids(processor)
    stopping = torch.isin(ids, torch.tensor(sorted(_special_ids(processor) - media)))
    stops = stopping.clone()
    stops[:1] = False
    stops[1:] &= mask[:-1] & ~mask[1:] & ~stopping[:-1]  # a marked stop token needs no second
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


def _special_ids(processor: Any) -> set[int]:
    tokenizer = getattr(processor, "tokenizer", processor)
    return {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}


def _processed(processor: Any, messages: list[dict[str, Any]]) -> dict[str, Tensor]:
    """What the processor makes of it, without a batch dimension where it is per token."""
    found = processor.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_tensors="pt"
    )
    tensors = {name: torch.as_tensor(value) for name, value in found.items()}
    tensors.pop("attention_mask", None)
    return {
        name: value.long().reshape(-1) if name in _PER_TOKEN else value
        for name, value in tensors.items()
    }


def _marked(
    processor: Any, template: str, messages: list[dict[str, Any]]
) -> tuple[str, list[tuple[int, int]]]:
    """The rendered text, placeholders not expanded, and which characters the template marks."""
    from transformers.utils.chat_template_utils import render_jinja_template

    tokenizer = getattr(processor, "tokenizer", processor)
    texts, marks = render_jinja_template(
        conversations=[messages],
        chat_template=template,
        return_assistant_tokens_mask=True,
        **tokenizer.special_tokens_map,
    )
    return texts[0], [(int(start), int(end)) for start, end in marks[0]]


def _require_match(
    processor: Any, text: str, messages: Sequence[Mapping[str, Any]], index: int
) -> None:
    """Refused where the text has another number of placeholders than there are pictures, videos or
    sounds; not every release of every processor counts them."""
    kinds = [part["type"] for message in messages for part in message["content"]]
    # Gemma 3 writes the begin token of a picture for it; which attribute says so has changed
    for kind, begin in (("image", "boi"), ("video", "video"), ("audio", "boa")):
        tokens = {getattr(processor, f"{name}_token", None) for name in (kind, begin)}
        named = [str(token) for token in tokens if token is not None]
        count = sum(text.count(token) for token in named)
        if named and count != kinds.count(kind):
            raise Refused(
                f"conversation {index}: {count} placeholders for {kinds.count(kind)} parts of type"
                f" {kind}"
            )


def _trained(
    processor: Any, ids: Tensor, text: str, marks: list[tuple[int, int]], index: int
) -> Tensor:
    """(length,) bool: the tokens of `ids` that the marks of the unexpanded text cover.

    Special tokens that are no medium's are the same in both; a mark's first token is as far behind
    the last one before it, and its end as far before the next one behind it.
    """
    tokenizer = getattr(processor, "tokenizer", processor)
    plain = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    starts = [start for start, _ in plain["offset_mapping"]]
    fixed = _special_ids(processor) - media_ids(processor)
    here = [-1, *(i for i, token in enumerate(plain["input_ids"]) if token in fixed), len(starts)]
    there = [-1, *(i for i, token in enumerate(ids.tolist()) if token in fixed), len(ids)]
    if len(here) != len(there):
        raise Refused(
            f"conversation {index}: the processor's tokens hold {len(there) - 2} turn tokens, the"
            f" rendered template {len(here) - 2}"
        )
    mask = torch.zeros(len(ids), dtype=torch.bool)
    for start, end in marks:
        first, last = bisect_left(starts, start), bisect_left(starts, end)
        before = bisect_right(here, first) - 1
        behind = bisect_left(here, last)
        mask[there[before] + first - here[before] : there[behind] - (here[behind] - last)] = True
    return mask
