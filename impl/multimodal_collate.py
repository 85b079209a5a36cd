"""Conversations with pictures, videos and sounds to one batch, each first made a sample by itself.

One by one, so that an error names its conversation and no conversation's padding reaches another.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .chat import chat_sample, media_ids
from .collate import collate
from .label_rules import LabelRules
from .training_plan import TrainingPlan

Messages = Sequence[Mapping[str, Any]]
# Sounds of a batch are as long as its longest; the mask says what of them is real.
_FRAMED = ("input_features", "input_features_mask")


def collate_conversations(
    conversations: Sequence[Messages],
    processor: Any,
    plan: TrainingPlan,
    *,
    pad_to_multiple_of: int = 1,
    indices: Sequence[int] | None = None,
) -> dict[str, Tensor]:
    """A batch of conversations: what `collate` gives for the samples that they become.

    Pictures, videos and sounds lie end to end in the order of their placeholders. Labels are on
    the turns that the plan trains, by default the assistant's with their stop tokens. indices: the
    conversations' numbers in the data set, for errors (their place in the batch without).
    Raises Refused, naming the conversation, before there is any batch: see `chat_sample`.
    """
    rules = LabelRules.of(plan)
    numbers = range(len(conversations)) if indices is None else indices
    samples = [
        chat_sample(processor, messages, number, rules)
        for messages, number in zip(conversations, numbers, strict=True)
    ]
    tokenizer = getattr(processor, "tokenizer", processor)
    return collate(
        _of_one_length(samples),
        plan,
        pad_id=tokenizer.pad_token_id,
        ignored_ids=media_ids(processor),
        pad_to_multiple_of=pad_to_multiple_of,
    )


def _of_one_length(samples: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    """Sounds (clips, frames, ...) filled up with zeros, and their masks with False."""
    for name in _FRAMED:
        frames = max((s[name].shape[1] for s in samples if name in s), default=0)
        for sample in samples:
            if name in sample:
                lacking = frames - sample[name].shape[1]
                after = [0, 0] * (sample[name].dim() - 2) + [0, lacking]
                sample[name] = torch.nn.functional.pad(sample[name], after)
    return samples
