"""What the installed versions make of conversations and pictures: two parts of a schema snapshot.

Rendering goes through the tokenizer, and counts through classes that need Pillow alone, so that a
snapshot says what a version is, whether torchvision is installed or not.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from typing import Any

from conformance import processors
from conformance.case import Model

# height and width of pictures, at the sizes of life
SIZES = ((224, 224), (480, 640), (1080, 1920), (1500, 300), (30, 2000))
_LONG = 200  # characters of a value that is worth writing down


def conversation(model: Model) -> dict[str, Any] | None:
    """The rendered text, what of it is marked to train, its token ids and the special ids."""
    from transformers.utils.chat_template_utils import render_jinja_template

    if model.name not in processors.KITS:
        return None
    kit = processors.KITS[model.name]
    tokenizer = processors.tokenizer(kit.layout)
    parts = [{"type": "image"}] if kit.image else []
    messages = processors.conversation(parts, turns=2)
    texts, marks = render_jinja_template(
        conversations=[messages],
        chat_template=tokenizer.chat_template,
        return_assistant_tokens_mask=True,
        **tokenizer.special_tokens_map,
    )
    return {
        "text": texts[0],
        "trained": [texts[0][start:end] for start, end in marks[0]],
        "ids": " ".join(map(str, tokenizer(texts[0], add_special_tokens=False)["input_ids"])),
        "special": dict(sorted(tokenizer.special_tokens_map.items(), key=str)),
    }


def processing(model: Model) -> dict[str, Any] | None:
    """The processor's arguments, its picture part's defaults, and tokens by size; None where the
    model has no processor or its class needs torchvision."""
    kit = processors.KITS.get(model.name)
    if kit is None or kit.processor is None or processors.missing(model.name):
        return None
    import transformers

    kind = getattr(transformers, kit.processor)
    found: dict[str, Any] = {"arguments": sorted(inspect.signature(kind.__init__).parameters)}
    if kit.image and kit.image[0].endswith("Pil") and not processors.missing(model.name, "image"):
        made = processors.processor(model.name, published=True)
        found["picture"] = _plain(made.image_processor.to_dict())
        foretell = getattr(made, "_get_num_multimodal_tokens", None)  # older releases lack some
        if foretell is not None:
            told = foretell(image_sizes=[list(size) for size in SIZES]).num_image_tokens
            names = (f"{h} x {w}" for h, w in SIZES)
            found["tokens of a picture"] = dict(zip(names, map(int, told), strict=True))
        if kit.audio:
            found["sound"] = _plain(made.feature_extractor.to_dict())
    return found


def _plain(data: Mapping[str, Any]) -> dict[str, Any]:
    """The short values, by name."""
    texts = {name: json.dumps(value, default=str, sort_keys=True) for name, value in data.items()}
    return {name: json.loads(text) for name, text in sorted(texts.items()) if len(text) < _LONG}
