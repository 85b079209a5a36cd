"""A conversation to a sample: rendered by the processor's own template, labelled where it trains.

What trains by default is what the template marks as generated, which should be the assistant's
turns; the stop token right behind a marked turn trains too, since a model that never learns it
never stops (axolotl#3756). `LabelRules` says otherwise. Pictures, sounds, videos and their begin
and end tokens never train.

Where a turn lies among the processor's tokens is counted here, from the turn tokens next to
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
from .label_rules import LabelRules
from .loss import IGNORED
from .model_facts import TYPE_ID_NAMES
from .pictures import opened
from .turns import Turn, turns

_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")
_PER_TOKEN = ("input_ids", "attention_mask", *TYPE_ID_NAMES)
# Named tokens of tokenizers and processors that stand for a medium or for one of its ends.
_MEDIA = (
    *("image", "boi", "eoi", "video", "audio", "boa", "eoa"),
    *("vision_start", "vision_end", "vision_bos", "vision_eos"),
)
DEFAULT = LabelRules()
_FAULTS = (ValueError, TypeError, KeyError, OSError, IndexError, StopIteration)


def chat_sample(
    processor: Any,
    messages: Sequence[Mapping[str, Any]],
    index: int = 0,
    rules: LabelRules = DEFAULT,
) -> dict[str, Tensor]:
    """One conversation as `input_ids` and `labels` (length,), with the processor's type ids and
    features.

    processor: a processor, or a tokenizer alone. messages: role and content each; content is text
    or parts (`{"type": "text" | "image" | "audio" | "video", ...}`). index: names it in errors.
    rules: whose turns and stop tokens train. Raises Refused, naming the conversation, for a
    template that marks nothing, a picture that cannot be read, and placeholders that the pictures,
    videos and sounds do not match.
    """
    template = marked_template(processor, index)
    ready = [opened(message, index) for message in messages]
    try:
        sample = _processed(processor, ready)
        text, spans = turns(processor, template, ready, rules, index)
    except _FAULTS as error:
        what = str(error).strip() or type(error).__name__
        raise Refused(f"conversation {index}: {what.splitlines()[0]}") from error
    _require_match(processor, text, ready, index)
    ranges = _in_tokens(processor, sample["input_ids"], text, spans, index)
    said = any(m["role"] == "assistant" for m in messages)
    if said and rules.trains("assistant") and not any(t.role == "assistant" for t in ranges):
        raise Refused(f"conversation {index}: no token of its assistant's turns is marked to train")
    sample["labels"] = labels_of(sample["input_ids"], ranges, processor, rules)
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


def labels_of(
    ids: Tensor, ranges: Sequence[Turn], processor: Any, rules: LabelRules = DEFAULT
) -> Tensor:
    """Labels (length,) of tokens (length,): the turns that train, and the stop tokens that do.

    ranges: turns in tokens; a stop token is a special token, no medium's, at a turn's end or right
    behind it. Nothing of a medium is labelled, in whatever turn.
    """
    media = media_ids(processor)
    special = torch.isin(ids, torch.tensor(sorted(_special_ids(processor) - media)))
    kept = torch.zeros(len(ids), dtype=torch.bool)
    stops: list[tuple[int, bool]] = []
    for turn in ranges:
        ends = [i for i in (turn.end - 1, turn.end) if turn.start <= i < len(ids) and special[i]]
        stops += [(i, rules.trains(turn.role)) for i in ends[:1]]
        kept[turn.start : turn.end] |= rules.trains(turn.role)
    eos = {"turn": [i for i, trained in stops if trained], "all": [i for i, _ in stops]}
    eos |= {"last": [i for i, _ in stops[-1:]], "none": []}
    kept[[i for i, _ in stops]] = False
    kept[eos[rules.train_on_eos]] = True
    return ids.masked_fill(~kept | _of_media(ids, media, processor), IGNORED)


def _of_media(ids: Tensor, media: frozenset[int], processor: Any) -> Tensor:
    """(length,) bool: the tokens of media, with the blank lines that a processor writes around."""
    found = torch.isin(ids, torch.tensor(sorted(media)))
    if not hasattr(processor, "full_image_sequence"):
        return found
    tokenizer = getattr(processor, "tokenizer", processor)
    blank = torch.tensor([tokenizer.decode([i]).isspace() for i in ids.tolist()])
    while True:
        beside = found.roll(1) | found.roll(-1)
        beside[0], beside[-1] = found[1:2].any(), found[-2:-1].any()
        grown = found | (blank & beside)
        if torch.equal(grown, found):
            return found
        found = grown


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


def _in_tokens(
    processor: Any, ids: Tensor, text: str, spans: Sequence[Turn], index: int
) -> list[Turn]:
    """The turns of the unexpanded text as ranges of `ids`; those without a token left out.

    Special tokens that are no medium's are the same in both; a place is as far behind the last one
    before it where no medium stands between, else as far before the next one behind it.
    """
    tokenizer = getattr(processor, "tokenizer", processor)
    plain = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    starts = [start for start, _ in plain["offset_mapping"]]
    media = media_ids(processor)
    fixed = _special_ids(processor) - media
    here = [-1, *(i for i, token in enumerate(plain["input_ids"]) if token in fixed), len(starts)]
    there = [-1, *(i for i, token in enumerate(ids.tolist()) if token in fixed), len(ids)]
    if len(here) != len(there):
        raise Refused(
            f"conversation {index}: the processor's tokens hold {len(there) - 2} turn tokens, the"
            f" rendered template {len(here) - 2}"
        )

    def placed(character: int) -> int:
        token = bisect_left(starts, character)
        before = bisect_right(here, token - 1) - 1
        if media.isdisjoint(plain["input_ids"][here[before] + 1 : token]):
            return there[before] + token - here[before]
        behind = bisect_left(here, token)
        return there[behind] - (here[behind] - token)

    found = [Turn(turn.role, placed(turn.start), placed(turn.end)) for turn in spans]
    return [turn for turn in found if turn.end > turn.start]
