"""Real processors at the tiny models' sizes, and conversations to feed them (torch comes lazily).

The tokenizers and chat templates are ours (`fixtures/tokenizers`), with the families' own special
tokens at the tiny configs' ids; image, video and audio processing are the installed classes. What
torchvision alone can do (videos, the unified model's pictures) is `missing` without it; a stand-in
then takes its place in the processor and refuses to be used.
"""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from conformance.case import Model
from conformance.families import MODELS
from conformance.oracles import picture_tokens
from conformance.oracles.turns import Turns
from conformance.paths import fixtures

Message = dict[str, Any]
Conversation = list[Message]
BUDGET = 70  # picture tokens: the smallest that Gemma 4's image processor takes
EDGE = 160  # positions along a picture's side; the longest picture has 1 x 70 tokens
RATE = 16_000  # samples of sound a second
GOOD = ("square", "wide", "tall", "odd", "grey", "clear")
BAD = {"broken": "broken.png", "truncated": "truncated.jpg"}


@dataclass(frozen=True)
class Kit:
    """What a model's conversations go through.

    layout: folder of `fixtures/tokenizers`. processor: class in transformers, None for a tokenizer
    alone. image, video, audio: class and arguments. options: further arguments of the processor.
    edge: the tiny vision config's field that bounds a picture's side, where `EDGE` is needed.
    """

    layout: str
    processor: str | None = None
    image: tuple[str, Mapping[str, Any]] | None = None
    video: tuple[str, Mapping[str, Any]] | None = None
    audio: tuple[str, Mapping[str, Any]] | None = None
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    edge: str | None = None
    count: picture_tokens.Count | None = None


# in words of `size`: until after 5.17 `min_pixels` and `max_pixels` became the class's own defaults
_AREA = {"shortest_edge": 64, "longest_edge": 400}
_QWEN_SIZES = {"patch_size": 2, "merge_size": 2, "temporal_patch_size": 2}
_GEMMA4_SIZES = {"patch_size": 2, "pooling_kernel_size": 2, "max_soft_tokens": BUDGET}
_UNIFIED_SIZES = {**_GEMMA4_SIZES, "pooling_kernel_size": 3}
_EDGE_16 = {"size": {"height": 16, "width": 16}}


def _gemma4(audio: bool = False) -> Kit:
    mel = {"feature_size": 16 if audio else 128}
    return Kit(
        "gemma4",
        "Gemma4Processor",
        ("Gemma4ImageProcessorPil", _GEMMA4_SIZES),
        ("Gemma4VideoProcessor", {**_GEMMA4_SIZES, "num_frames": 3}),
        ("Gemma4AudioFeatureExtractor", mel),
        edge="position_embedding_size",
        count=picture_tokens.within_budget(BUDGET),
    )


_QWEN = Kit(
    "qwen",
    "Qwen3VLProcessor",
    ("Qwen2VLImageProcessorPil", {**_QWEN_SIZES, "size": _AREA}),
    (
        "Qwen3VLVideoProcessor",
        {**_QWEN_SIZES, "size": {"shortest_edge": 256, "longest_edge": 1024}},
    ),
    count=picture_tokens.within_area(
        side=4, least=_AREA["shortest_edge"], most=_AREA["longest_edge"]
    ),
)
KITS: dict[str, Kit] = {
    "gemma4-moe": _gemma4(),
    "gemma4-dense": _gemma4(),
    "gemma4-e2b": _gemma4(audio=True),
    "gemma4-e4b": _gemma4(audio=True),
    "gemma4-text": Kit("gemma4"),
    "gemma4-unified": Kit(
        "gemma4",
        "Gemma4UnifiedProcessor",
        ("Gemma4UnifiedImageProcessor", _UNIFIED_SIZES),
        ("Gemma4UnifiedVideoProcessor", {**_UNIFIED_SIZES, "num_frames": 3}),
        (
            "Gemma4UnifiedAudioFeatureExtractor",
            {"feature_size": 20, "audio_samples_per_token": 20},
        ),
        edge="mm_posemb_size",
        count=picture_tokens.within_budget(BUDGET),
    ),
    "gemma3-text": Kit("gemma3"),
    "gemma3-vlm": Kit(
        "gemma3",
        "Gemma3Processor",
        ("Gemma3ImageProcessorPil", _EDGE_16),
        options={"image_seq_length": 4},
        count=picture_tokens.always(4),
    ),
    "gemma3n": Kit(
        "gemma3n",
        "Gemma3nProcessor",
        ("SiglipImageProcessorPil", _EDGE_16),
        audio=("Gemma3nAudioFeatureExtractor", {"feature_size": 16}),
        options={"image_seq_length": 4, "audio_seq_length": 6},
        count=picture_tokens.always(4),
    ),
    "qwen3_5": _QWEN,
    "qwen3_5_moe": _QWEN,
    "qwen3_moe": Kit("qwen"),
}
WITH_PICTURES = tuple(n for n, kit in KITS.items() if kit.count and "vision" in MODELS[n].traits)
WITH_SOUND = tuple(n for n, kit in KITS.items() if kit.audio and "audio" in MODELS[n].traits)
WITH_VIDEO = tuple(n for n, kit in KITS.items() if kit.video)
# What checks ask for by the name of a fixture: the model's name, where its processor takes these.
FIXTURES: dict[str, tuple[str, ...]] = {
    "kit": (),
    "image_kit": ("image",),
    "sound_kit": ("audio",),
    "video_kit": ("video",),
}
# One model of each processor and of each tokenizer that is used alone.
EACH_LAYOUT = (
    *("gemma4-dense", "gemma4-e2b", "gemma4-unified", "gemma4-text", "gemma3-vlm", "gemma3-text"),
    *("gemma3n", "qwen3_5", "qwen3_moe"),
)


@cache
def turns(layout: str) -> Turns:
    """How a layout's turns are written (`turns.json` beside its template)."""
    data = json.loads((fixtures() / "tokenizers" / layout / "turns.json").read_text())
    return Turns(**data)


def missing(name: str, *kinds: str) -> str | None:
    """Why a model's processor cannot be had here, or not take "image", "video" or "audio"; None
    where it can."""
    import transformers

    try:
        getattr(transformers, KITS[name].processor or "PreTrainedTokenizerFast")
    except (AttributeError, ImportError) as error:
        return f"{KITS[name].processor} {_lacks(error)}"
    for kind in kinds:
        named = getattr(KITS[name], kind)
        if named is None:
            return f"{KITS[name].processor or 'its tokenizer'} takes no {kind}"
        try:
            getattr(transformers, named[0])(**named[1])
        except (AttributeError, ImportError) as error:
            return f"{named[0]} {_lacks(error)}"
    return None


def kit_of(name: str, fixture: str, decline: Callable[[str], None]) -> str:
    """The model's name, its processor being there; what `FIXTURES` demands is declined without."""
    if reason := missing(name, *FIXTURES[fixture]):
        decline(reason)
    return name


def _lacks(error: BaseException) -> str:
    told = f"{error} {error.__cause__}"
    return "needs torchvision" if "orchvision" in told else str(error).strip().splitlines()[0]


def tokenizer(layout: str) -> Any:
    """A fresh tokenizer of a layout with its chat template."""
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast.from_pretrained(str(fixtures() / "tokenizers" / layout))


@cache
def processor(name: str, published: bool = False) -> Any:
    """The processor of a model, or its tokenizer where it has no processor; one a process.

    published: with the classes' own defaults instead of sizes that fit the tiny model.
    """
    import transformers

    kit = KITS[name]
    words = tokenizer(kit.layout)
    if kit.processor is None:
        return words
    parts: dict[str, Any] = {"tokenizer": words}
    for argument, kind in (
        ("image_processor", "image"),
        ("video_processor", "video"),
        ("feature_extractor", "audio"),
    ):
        named = getattr(kit, kind)
        if named is not None:
            lacking = missing(name, kind)
            sizes = {} if published else named[1]
            parts[argument] = (
                _stand_in(kind, lacking) if lacking else getattr(transformers, named[0])(**sizes)
            )
    options = {} if published else kit.options
    made = _tolerant(getattr(transformers, kit.processor))
    return made(**parts, **options, chat_template=words.chat_template)


def _stand_in(kind: str, reason: str) -> Any:
    """Fills the place of a part that cannot be built, and says why when it is used."""
    from transformers.image_processing_utils import BaseImageProcessor
    from transformers.video_processing_utils import BaseVideoProcessor

    base: Any = BaseVideoProcessor if kind == "video" else BaseImageProcessor

    def refuse(self: Any, *args: Any, **kwargs: Any) -> Any:
        raise RuntimeError(reason)

    made = type("StandIn", (base,), {"__call__": refuse, "preprocess": refuse, "stands_in": True})
    return made()


def _tolerant(kind: Any) -> Any:
    """The processor's class, which takes a stand-in: without torchvision transformers cannot even
    name the base class that it would have a video processor be."""

    def checked(self: Any, name: str, part: Any) -> Any:
        if getattr(part, "stands_in", False):
            return type(part)
        return kind.check_argument_for_proper_class(self, name, part)

    return type(kind.__name__, (kind,), {"check_argument_for_proper_class": checked})


def tokenizer_of(processing: Any) -> Any:
    """The tokenizer of a processor, or the tokenizer itself."""
    return getattr(processing, "tokenizer", processing)


def pictured(model: Model) -> Model:
    """The model with room for pictures of any shape that its processor makes, by another name."""
    field = KITS[model.name].edge
    if field is None:
        return model
    vision = {**model.tiny["vision_config"], field: EDGE}
    tiny = {**model.tiny, "vision_config": vision}
    return dataclasses.replace(model, name=f"{model.name}-pictures", tiny=tiny)


def picture(name: str) -> Any:
    """A committed picture, decoded."""
    from PIL import Image

    with Image.open(fixtures() / "images" / f"{name}.png") as image:
        image.load()
        return image.copy()


def bad_picture(kind: str) -> str:
    """The path of a file that is "broken" (no picture) or "truncated"."""
    return str(fixtures() / "images" / BAD[kind])


def blank(width: int, height: int) -> Any:
    """A picture of any size, with a slope of colour."""
    from PIL import Image

    slope = Image.linear_gradient("L").resize((width, height))
    return Image.merge("RGB", (slope, slope.transpose(Image.Transpose.ROTATE_180), slope))


def noise(width: int, height: int) -> Any:
    """A picture of the same noise each time."""
    from PIL import Image

    return Image.frombytes("RGB", (width, height), random.Random(0).randbytes(3 * width * height))


def sound(samples: int) -> Any:
    """A rising tone of so many samples, float32 in ±0.5, as `numpy` has it."""
    import numpy

    time = numpy.arange(samples) / RATE
    return (0.5 * numpy.sin(2 * numpy.pi * (300 + 200 * time) * time)).astype("float32")


def film(frames: int, height: int, width: int) -> Any:
    """Frames (F, H, W, 3) uint8, each of its own brightness, as `numpy` has it."""
    import numpy

    levels = (numpy.arange(frames) * 200 // frames + 20).astype("uint8")
    found = numpy.broadcast_to(levels[:, None, None, None], (frames, height, width, 3)).copy()
    found[:, : height // 2, :, 0] = 250
    return found


_QUESTIONS = ("how many shapes are there?", "what is this?", "and the other picture?", "is it so?")
_ANSWERS = ("two red discs", "a square, and a disc", "it is the answer in the text", "that is all")


def conversation(
    parts: Sequence[Message] = (),
    *,
    index: int = 0,
    turns: int = 2,
    system: bool = True,
    plain: bool = False,
) -> Conversation:
    """A system turn, then `turns` questions with answers; `parts` come inside the first question.

    index: picks questions and answers, so that conversations have unequal numbers of labels.
    plain: the system's turn is text and no list of parts.
    """
    brief: Any = "be brief" if plain else [{"type": "text", "text": "be brief"}]
    found: Conversation = [{"role": "system", "content": brief}] if system else []
    for turn in range(turns):
        question = _QUESTIONS[(index + turn) % len(_QUESTIONS)]
        words = [{"type": "text", "text": question}]
        # the first part comes before the words, the others after them
        content = [*parts[:1], *words, *parts[1:]] if turn == 0 else words
        found.append({"role": "user", "content": [dict(part) for part in content]})
        answer = _ANSWERS[(index + turn) % len(_ANSWERS)]
        found.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    return found


def with_pictures(*names: str, **options: Any) -> Conversation:
    """A conversation about committed pictures."""
    return conversation([{"type": "image", "image": picture(name)} for name in names], **options)
