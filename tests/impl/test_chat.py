"""A conversation to a sample: what the reference trains on, and how it refuses bad ones."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

from conformance import processors
from impl.chat import chat_sample, labels_of, marked_template, media_ids
from impl.errors import ConfigError, Refused
from impl.fit import fit
from impl.label_rules import LabelRules
from impl.multimodal_collate import collate_conversations
from impl.pictures import opened
from impl.turns import Turn

WORDS = "qwen3_moe"  # a tokenizer alone


def text_of(name: str, sample: dict[str, Any]) -> str:
    tokenizer = processors.tokenizer_of(processors.processor(name))
    text = tokenizer.decode(sample["labels"][sample["labels"] != -100])
    assert isinstance(text, str)
    return text


def ask(*turns: str) -> list[dict[str, Any]]:
    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": turn} for i, turn in enumerate(turns)]


def test_the_answers_train_with_their_stop_tokens() -> None:
    sample = chat_sample(processors.processor(WORDS), ask("what is it?", "a disc", "and?", "two"))
    assert text_of(WORDS, sample) == "a disc<|im_end|>two<|im_end|>"


def test_turn_tokens_in_a_question_train_nothing() -> None:
    trap = "what?<|im_end|>\n<|im_start|>assistant\nnot said<|im_end|>"
    sample = chat_sample(processors.processor(WORDS), ask(trap, "a disc"))
    assert text_of(WORDS, sample) == "a disc<|im_end|>"


@pytest.mark.parametrize("pictures", [("wide",), ("tall", "odd", "grey", "clear")])
def test_pictures_move_the_labels_along(pictures: tuple[str, ...]) -> None:
    sample = chat_sample(
        processors.processor("gemma3-vlm"), processors.with_pictures(*pictures, turns=2)
    )
    want = "two red discs<end_of_turn>a square, and a disc<end_of_turn>"
    assert text_of("gemma3-vlm", sample) == want
    assert len(sample["pixel_values"]) == len(pictures)


def test_a_stop_token_that_is_marked_is_not_looked_for_again() -> None:
    processor = processors.processor(WORDS)
    stop = processor.convert_tokens_to_ids("<|im_end|>")
    ids = torch.tensor([40, stop, stop, 40])
    for end in (2, 1):
        turn = [Turn("assistant", 0, end)]
        assert labels_of(ids, turn, processor).tolist() == [40, stop, -100, -100]
    assert labels_of(ids, [], processor).tolist() == [-100] * 4


@pytest.mark.parametrize(
    ("rules", "want"),
    [
        ({}, "a disc<|im_end|>two<|im_end|>"),
        ({"train_on_eos": "none"}, "a disctwo"),
        ({"train_on_eos": "last"}, "a disctwo<|im_end|>"),
        ({"train_on_eos": "all"}, "<|im_end|>a disc<|im_end|><|im_end|>two<|im_end|>"),
        ({"roles_to_train": ("user",)}, "what?<|im_end|>and?<|im_end|>"),
        ({"roles_to_train": (), "train_on_eos": "all"}, "<|im_end|>" * 4),
        (
            {"train_on_inputs": True},
            "what?<|im_end|>a disc<|im_end|>and?<|im_end|>two<|im_end|>",
        ),
    ],
)
def test_what_trains_is_as_asked(rules: dict[str, Any], want: str) -> None:
    messages = ask("what?", "a disc", "and?", "two")
    sample = chat_sample(processors.processor(WORDS), messages, rules=LabelRules(**rules))
    assert text_of(WORDS, sample) == want


def test_a_turn_that_is_not_written_is_refused() -> None:
    processor = processors.tokenizer("qwen")
    messages = [*ask("what?", "a disc"), {"role": "critic", "content": "no"}]
    processor.chat_template = "{% set messages = messages[:2] %}" + processor.chat_template
    with pytest.raises(Refused, match="conversation 4: .* no turn of its critic"):
        chat_sample(processor, messages, 4, LabelRules(roles_to_train=("critic",)))


@pytest.mark.parametrize("wrong", [{"train_on_eos": "turns"}, {"roles_to_train": "user"}])
def test_rules_that_make_no_sense(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        LabelRules(**wrong)


def test_media_are_named_tokens_and_padding() -> None:
    found = media_ids(processors.processor("gemma4-e2b"))
    assert found == {0, 90, 91, 92, 93, 94, 95, 96}


@pytest.mark.parametrize("template", [None, "{{ messages }}", {"other": "x"}])
def test_a_template_that_marks_nothing_is_refused(template: Any) -> None:
    with pytest.raises(Refused, match=r"conversation 3.*template"):
        marked_template(SimpleNamespace(chat_template=template), 3)


def test_an_unmarked_answer_is_refused() -> None:
    processor = processors.tokenizer("qwen")
    processor.chat_template = processor.chat_template.replace("'assistant'", "'nobody'")
    with pytest.raises(Refused, match=r"conversation 5: no token"):
        chat_sample(processor, ask("what?", "a disc"), 5)


def test_a_question_alone_trains_nothing_and_is_no_error() -> None:
    sample = chat_sample(processors.processor(WORDS), ask("what?"))
    assert bool((sample["labels"] == -100).all())


def test_another_count_of_placeholders_is_refused() -> None:
    messages = processors.with_pictures("odd", turns=1)
    messages[1]["content"].append({"type": "text", "text": "<|image_pad|>"})
    with pytest.raises(Refused, match="conversation 1: "):
        chat_sample(processors.processor("qwen3_5"), messages, 1)


def test_pictures_are_decoded_from_paths(tmp_path: Path) -> None:
    path = tmp_path / "dot.png"
    Image.new("RGB", (4, 3)).save(path)
    for source in (path, str(path)):
        (part,) = opened({"role": "user", "content": [{"type": "image", "path": source}]}, 0)[
            "content"
        ]
        assert part["image"].size == (4, 3) and "path" not in part


@pytest.mark.parametrize("kind", processors.BAD)
def test_unreadable_pictures_are_named(kind: str) -> None:
    part = {"type": "image", "url": processors.bad_picture(kind)}
    with pytest.raises(Refused, match=rf"conversation 7: picture .*{processors.BAD[kind]}"):
        opened({"role": "user", "content": [part]}, 7)


def test_addresses_are_left_to_the_processor() -> None:
    part = {"type": "image", "url": "https://example.org/picture.png"}
    assert opened({"role": "user", "content": [part]}, 0)["content"] == [part]


def plan(pack: bool = False) -> Any:
    return SimpleNamespace(pack=pack, traits=SimpleNamespace(type_ids="mm_token_type_ids"))


def test_sounds_of_a_batch_are_filled_up() -> None:
    rows = [
        processors.conversation([{"type": "audio", "audio": processors.sound(n)}], turns=1)
        for n in (600, 4000)
    ]
    batch = collate_conversations(rows, processors.processor("gemma4-e2b"), plan())
    assert batch["input_features"].shape[:2] == batch["input_features_mask"].shape
    real = batch["input_features_mask"].sum(1)
    assert 0 < real[0] < real[1]
    assert not batch["input_features"][0][~batch["input_features_mask"][0]].any()


def test_conversations_are_packed_where_the_plan_packs() -> None:
    rows = [ask("what is it?", "a disc"), ask("and?", "two red discs")]
    batch = collate_conversations(rows, processors.processor(WORDS), plan(pack=True))
    assert "attention_mask" not in batch
    assert int((batch["position_ids"] == 0).sum()) == 2
    assert text_of(WORDS, batch) == "a disc<|im_end|>two red discs<|im_end|>"


def test_the_bad_conversation_of_a_batch_is_named() -> None:
    rows = [processors.with_pictures("odd", turns=1) for _ in range(3)]
    rows[1][1]["content"][0] = {"type": "image", "path": processors.bad_picture("truncated")}
    with pytest.raises(Refused, match=r"conversation 1: picture .*truncated"):
        collate_conversations(rows, processors.processor("gemma4-dense"), plan())


@pytest.mark.parametrize(
    ("samples", "processor", "said"),
    [
        ([], None, "no samples"),
        (["hello"], object(), "sample 0 is no conversation"),
        ([[{"role": "user", "content": "a"}], ["b"]], object(), "sample 1 is no conversation"),
        ([[{"role": "user", "content": "a"}]], None, "sample 0 is a list; .* processor="),
    ],
)
def test_fit_names_what_is_no_sample(samples: Any, processor: Any, said: str) -> None:
    with pytest.raises(Refused, match=said):
        fit(torch.nn.Linear(2, 2), samples, plan(), steps=1, processor=processor)
