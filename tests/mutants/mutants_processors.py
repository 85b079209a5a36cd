"""Bugs of processors, templates and conversations: T01 to T09, V09, V11, V21 to V32."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import pytest
import torch

from tests.mutants import mutant
from tests.mutants.mutants_forward import around
from tests.mutants.mutants_vision import forward_with

RENDER = "transformers.processing_utils:render_jinja_template"
SAMPLE = "impl.multimodal_collate:chat_sample"
GEMMA4 = "transformers.models.gemma4.processing_gemma4:Gemma4Processor"
GEMMA3N = "transformers.models.gemma3n.processing_gemma3n:Gemma3nProcessor"
QWEN = "transformers.models.qwen3_5.modeling_qwen3_5:Qwen3_5Model"
PULL = "https://github.com/axolotl-ai-cloud/axolotl/pull"
ISSUE = "https://github.com/huggingface/transformers/issues"


def calling(patch: pytest.MonkeyPatch, target: str, change: Any) -> None:
    """`change(original, *args, **options)` in place of each call of `module:function`."""
    around(patch, target, lambda original: lambda *args, **o: change(original, *args, **o))


def rendering(patch: pytest.MonkeyPatch, change: Any) -> None:
    """Every rendered conversation through `change(text, messages)`."""

    def render(original: Any, conversations: Any, *args: Any, **options: Any) -> Any:
        texts, marks = original(conversations, *args, **options)
        return [change(t, c) for t, c in zip(texts, conversations, strict=True)], marks

    calling(patch, RENDER, render)


def labelling(patch: pytest.MonkeyPatch, change: Any) -> None:
    """Labels of each conversation through `change(labels, ids, turns, processor)`."""

    def labels(original: Any, ids: Any, turns: Any, processor: Any, rules: Any) -> Any:
        return change(original(ids, turns, processor, rules), ids, turns, processor)

    calling(patch, "impl.chat:labels_of", labels)


@mutant("b190", case="T01/gemma4-dense/-/single", issue="axolotl#1806, #2224")
def the_templates_default_changed(patch: pytest.MonkeyPatch) -> None:
    """The system turn is no longer written."""
    rendering(patch, lambda text, messages: text.replace("<|turn>system\nbe brief<turn|>\n", ""))


@mutant("b186", case="T01/gemma3-vlm/-/single", issue=f"{PULL}/3728")
def the_system_turn_is_lost_in_the_loop(patch: pytest.MonkeyPatch) -> None:
    """What a loop of the template sets is gone behind it."""
    rendering(patch, lambda text, messages: text.replace("be brief\n\n", ""))


@mutant("b188", case="T02/qwen3_5/-/single", issue=f"{PULL}/3592")
def spans_are_those_of_the_raw_text(patch: pytest.MonkeyPatch) -> None:
    """Marked spans are not moved by what pictures are replaced with."""

    def ranges(original: Any, processor: Any, ids: Any, text: str, *rest: Any) -> Any:
        plain = torch.tensor(processor.tokenizer(text, add_special_tokens=False)["input_ids"])
        return original(processor, plain, text, *rest)

    calling(patch, "impl.chat:_in_tokens", ranges)


@mutant("b183", case="T02/gemma4-dense/-/single", issue=f"{PULL}/3625")
def every_turn_trains(patch: pytest.MonkeyPatch) -> None:
    """A model is trained on its user's turns too."""

    labelling(patch, lambda labels, ids, turns, processor: ids)


def _hide(patch: pytest.MonkeyPatch, token: str) -> None:
    """Labels without a token."""

    def without(labels: Any, ids: Any, turns: Any, processor: Any) -> Any:
        hidden = processor.tokenizer.convert_tokens_to_ids(token)
        return labels.masked_fill(ids == hidden, -100)

    labelling(patch, without)


@mutant("b184", case="T02/gemma4-e2b/-/single", issue=f"{PULL}/3756")
def the_end_of_a_turn_is_masked(patch: pytest.MonkeyPatch) -> None:
    """The model never learns to stop."""
    _hide(patch, "<turn|>")


@mutant("b181", case="T03/gemma4-dense/images/single", issue=f"{ISSUE}/34625")
def a_picture_has_a_token_fewer(patch: pytest.MonkeyPatch) -> None:
    """Processor and model disagree about how many tokens a picture is."""

    def make(original: Any) -> Any:
        return lambda *args, **options: original(*args, **options).replace("<|image|>", "", 1)

    around(patch, f"{GEMMA4}.replace_image_token", make)


@mutant("b180-begin", case="T04/gemma4-dense/-/single", issue="LlamaFactory#10389")
def a_second_begin_token(patch: pytest.MonkeyPatch) -> None:
    """The tokenizer puts its begin token before the template's."""

    def call(original: Any, *args: Any, **options: Any) -> Any:
        options.pop("add_special_tokens", None)
        return original(*args, **options)

    calling(patch, "transformers.processing_utils:ProcessorMixin.__call__", call)


@mutant("generic-rewritten", case="T05/qwen3_5/-/single", issue="checks.md T05 (no thread)")
def earlier_turns_are_rewritten(patch: pytest.MonkeyPatch) -> None:
    """A longer conversation shows its first answer another way."""

    def change(text: str, messages: Any) -> str:
        return text.replace("two red discs", "two") if len(messages) > 4 else text

    rendering(patch, change)


@mutant("b189", case="T06/gemma4-dense/-/single", issue="trl#6577, #6578, #5685")
def nothing_is_marked_and_nobody_minds(patch: pytest.MonkeyPatch) -> None:
    """A template without marks makes a batch in which nothing trains."""

    def sample(original: Any, processor: Any, messages: Any, *rest: Any) -> Any:
        text = processor.apply_chat_template(messages, tokenize=False)
        try:
            return original(processor, messages, *rest)
        except import_module("impl.errors").Refused:
            ids = torch.tensor(processor.tokenizer(text, add_special_tokens=False)["input_ids"])
            return {"input_ids": ids, "labels": torch.full_like(ids, -100)}

    calling(patch, SAMPLE, sample)


@mutant("b184-marks", case="T07/gemma4-dense/-/single", issue=f"{PULL}/3756")
def only_what_is_marked_trains(patch: pytest.MonkeyPatch) -> None:
    """A stop token that the template writes behind its mark does not train."""

    def marked(labels: Any, ids: Any, turns: Any, processor: Any) -> Any:
        within = torch.zeros(len(ids), dtype=torch.bool)
        for turn in turns:
            within[turn.start : turn.end] = True
        return labels.masked_fill(~within, -100)

    labelling(patch, marked)


@mutant("b183-ends", case="T08/gemma4-dense/images/single", issue=f"{PULL}/3625")
def begin_and_end_of_a_picture_train(patch: pytest.MonkeyPatch) -> None:
    """What begins and ends a picture in an answer is labelled."""

    def ended(labels: Any, ids: Any, turns: Any, processor: Any) -> Any:
        for turn in turns:
            for i in range(turn.start, turn.end):
                if ids[i] in (processor.tokenizer.boi_token_id, processor.tokenizer.eoi_token_id):
                    labels[i] = ids[i]
        return labels

    labelling(patch, ended)
    around(patch, "impl.multimodal_collate:media_ids", lambda original: lambda p: frozenset({0}))


@mutant("b183-roles", case="T09/gemma4-dense/-/single", issue=f"{PULL}/3625")
def the_roles_are_not_read(patch: pytest.MonkeyPatch) -> None:
    """Whatever is asked for, the assistant's turns train."""
    rules = import_module("impl.label_rules").LabelRules
    patch.setattr(rules, "of", classmethod(lambda cls, plan: cls()))


@mutant("b186-rows", case="V09/qwen3_5/images/single", issue="ms-swift#8237")
def rows_and_columns_are_swapped(patch: pytest.MonkeyPatch) -> None:
    """A wide picture has the positions of a tall one."""

    def index(original: Any, *args: Any, **options: Any) -> Any:
        positions, deltas = original(*args, **options)
        return positions[[0, 2, 1]], deltas

    calling(patch, f"{QWEN}.get_rope_index", index)


@mutant("generic-dummy", case="V11/gemma3-vlm/images/single", issue="Liger e6f84b84")
def the_dummy_picture_counts(patch: pytest.MonkeyPatch) -> None:
    """What was fed to keep the tower busy is added to the loss."""

    def loss(original: Any, model: Any, batch: Any, n: Any = None) -> Any:
        return original(model, batch, n) + 0.01 * ("pixel_values" in batch)

    calling(patch, "impl.loss:loss", loss)


def _turned(patch: pytest.MonkeyPatch, turn: Any) -> None:
    """Batches with their pictures through `turn`."""

    def collate(original: Any, *args: Any, **options: Any) -> Any:
        batch = original(*args, **options)
        if "pixel_values" in batch:
            batch["pixel_values"] = turn(batch["pixel_values"])
        return batch

    calling(patch, "impl.multimodal_collate:collate", collate)


@mutant("b181-order", case="V21/gemma3-vlm/images/single", issue=f"{ISSUE}/34625")
def pictures_come_backwards(patch: pytest.MonkeyPatch) -> None:
    """The first picture's features are the last one's."""
    _turned(patch, lambda pixels: pixels.flip(0))


@mutant("generic-shifted", case="V22/gemma3-vlm/images/single", issue="checks.md V07 (no thread)")
def pictures_are_one_too_late(patch: pytest.MonkeyPatch) -> None:
    """Each picture of a batch is the one before it."""
    _turned(patch, lambda pixels: pixels.roll(1, 0))


def _grey(patch: pytest.MonkeyPatch) -> None:
    """Pictures that cannot be read are grey ones."""

    def decoded(original: Any, part: Any, index: int) -> Any:
        from PIL import Image

        try:
            return original(part, index)
        except import_module("impl.errors").Refused:
            return {"type": "image", "image": Image.new("RGB", (24, 24), (128, 128, 128))}

    calling(patch, "impl.pictures:decoded", decoded)


@mutant("generic-swallowed", case="V23/gemma4-dense/images/single", issue="issue 15")
def a_broken_picture_is_a_grey_one(patch: pytest.MonkeyPatch) -> None:
    """Training goes on with a picture of nothing."""
    _grey(patch)


@mutant("generic-swallowed-end", case="V24/gemma4-dense/images/single", issue="issue 15")
def a_truncated_picture_is_a_grey_one(patch: pytest.MonkeyPatch) -> None:
    """Half a picture is taken for a grey one."""
    _grey(patch)


@mutant("generic-nameless", case="V25/gemma4-dense/images/single", issue=f"{ISSUE}/35779")
def which_sample_it_is_is_not_said(patch: pytest.MonkeyPatch) -> None:
    """Of a data set of a million rows one has a placeholder too many."""

    refused = import_module("impl.errors").Refused

    def sample(original: Any, *args: Any, **options: Any) -> Any:
        try:
            return original(*args, **options)
        except refused as error:
            raise refused(str(error).partition(": ")[2]) from None

    calling(patch, SAMPLE, sample)


@mutant("generic-swallowed-step", case="V26/gemma3-vlm/images/single", issue="issue 15")
def a_step_is_taken_all_the_same(patch: pytest.MonkeyPatch) -> None:
    """The run goes on as if the picture had been read."""
    _grey(patch)


@mutant("L3-processor", case="V27/gemma3-vlm/images/single", issue="live defect L3")
def the_processors_type_ids_are_lost(patch: pytest.MonkeyPatch) -> None:
    """Pictures are attended to causally."""
    forward_with(patch, lambda kwargs: {**kwargs, "token_type_ids": None})


@mutant("b181-sound", case="V28/gemma4-e2b/-/single", issue=f"{ISSUE}/45242")
def the_padding_of_a_sound_is_sound(patch: pytest.MonkeyPatch) -> None:
    """What fills up the shorter sounds of a batch makes features too."""

    def filled(original: Any, samples: Any) -> Any:
        found = original(samples)
        for sample in found:
            sample["input_features_mask"] |= True
        return found

    calling(patch, "impl.multimodal_collate:_of_one_length", filled)


@mutant("b181-fixed", case="V30/gemma3n/-/single", issue=f"{ISSUE}/34625")
def a_sound_has_a_token_fewer(patch: pytest.MonkeyPatch) -> None:
    """187 places for 188 features."""

    def text(original: Any, *args: Any, **options: Any) -> str:
        whole: str = original(*args, **options)
        return whole.replace("<audio_soft_token>", "", 1)

    calling(patch, f"{GEMMA3N}.replace_audio_token", text)


@mutant("b183-loop", case="V31/gemma3-vlm/images/single", issue="trl#6577")
def the_loop_trains_on_questions(patch: pytest.MonkeyPatch) -> None:
    """In the loop every token of a conversation is learnt, the pictures' among them."""
    labelling(patch, lambda labels, ids, turns, processor: ids)


@mutant("generic-place", case="V32/gemma3-vlm/images/single", issue=f"{ISSUE}/35779")
def the_place_in_the_batch_is_named(patch: pytest.MonkeyPatch) -> None:
    """Of a data set of a million rows number 0 is bad, says a micro-batch of one."""

    def collate(original: Any, *args: Any, indices: Any = None, **options: Any) -> Any:
        return original(*args, **options)

    calling(patch, "impl.fit:collate_conversations", collate)
