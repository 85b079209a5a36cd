"""Bugs of processors, templates and conversations: T01 to T08, V09, V11, V21 to V30."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import pytest
import torch

from tests.mutants import mutant
from tests.mutants.mutants_forward import around
from tests.mutants.mutants_vision import forward_with

RENDER = "transformers.processing_utils:render_jinja_template"
GEMMA4 = "transformers.models.gemma4.processing_gemma4:Gemma4Processor"
GEMMA3N = "transformers.models.gemma3n.processing_gemma3n:Gemma3nProcessor"
QWEN = "transformers.models.qwen3_5.modeling_qwen3_5:Qwen3_5Model"
PULL = "https://github.com/axolotl-ai-cloud/axolotl/pull"
ISSUE = "https://github.com/huggingface/transformers/issues"


def rendering(patch: pytest.MonkeyPatch, change: Any) -> None:
    """Every rendered conversation through `change(text, messages)`."""

    def make(original: Any) -> Any:
        def render(conversations: Any, *args: Any, **options: Any) -> Any:
            texts, marks = original(conversations, *args, **options)
            return [change(t, c) for t, c in zip(texts, conversations, strict=True)], marks

        return render

    around(patch, RENDER, make)


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

    def make(original: Any) -> Any:
        def trained(processor: Any, ids: Any, text: str, marks: Any, index: int) -> Any:
            tokenizer = processor.tokenizer
            plain = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"])
            mask = torch.zeros(len(ids), dtype=torch.bool)
            mask[: len(plain)] = original(processor, plain, text, marks, index)
            return mask

        return trained

    around(patch, "impl.chat:_trained", make)


@mutant("b183", case="T02/gemma4-dense/-/single", issue=f"{PULL}/3625")
def every_turn_trains(patch: pytest.MonkeyPatch) -> None:
    """A model is trained on its user's turns too."""

    def make(original: Any) -> Any:
        def labels(ids: Any, mask: Any, processor: Any) -> Any:
            return original(ids, torch.ones_like(mask), processor)

        return labels

    around(patch, "impl.chat:trained_labels", make)


def _hide(patch: pytest.MonkeyPatch, token: str) -> None:
    """Labels without a token."""

    def make(original: Any) -> Any:
        def labels(ids: Any, mask: Any, processor: Any) -> Any:
            hidden = processor.tokenizer.convert_tokens_to_ids(token)
            return original(ids, mask, processor).masked_fill(ids == hidden, -100)

        return labels

    around(patch, "impl.chat:trained_labels", make)


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

    def make(original: Any) -> Any:
        def call(self: Any, *args: Any, **options: Any) -> Any:
            options.pop("add_special_tokens", None)
            return original(self, *args, **options)

        return call

    around(patch, "transformers.processing_utils:ProcessorMixin.__call__", make)


@mutant("generic-rewritten", case="T05/qwen3_5/-/single", issue="checks.md T05 (no thread)")
def earlier_turns_are_rewritten(patch: pytest.MonkeyPatch) -> None:
    """A longer conversation shows its first answer another way."""

    def change(text: str, messages: Any) -> str:
        return text.replace("two red discs", "two") if len(messages) > 4 else text

    rendering(patch, change)


@mutant("b189", case="T06/gemma4-dense/-/single", issue="trl#6577, #6578, #5685")
def nothing_is_marked_and_nobody_minds(patch: pytest.MonkeyPatch) -> None:
    """A template without marks makes a batch in which nothing trains."""

    def make(original: Any) -> Any:
        def sample(processor: Any, messages: Any, index: int = 0) -> Any:
            text = processor.apply_chat_template(messages, tokenize=False)
            try:
                return original(processor, messages, index)
            except import_module("impl.errors").Refused:
                ids = torch.tensor(processor.tokenizer(text, add_special_tokens=False)["input_ids"])
                return {"input_ids": ids, "labels": torch.full_like(ids, -100)}

        return sample

    around(patch, "impl.multimodal_collate:chat_sample", make)


@mutant("b184-marks", case="T07/gemma4-dense/-/single", issue=f"{PULL}/3756")
def only_what_is_marked_trains(patch: pytest.MonkeyPatch) -> None:
    """A stop token that the template writes behind its mark does not train."""

    def make(original: Any) -> Any:
        def labels(ids: Any, mask: Any, processor: Any) -> Any:
            return original(ids, mask, processor).masked_fill(~mask, -100)

        return labels

    around(patch, "impl.chat:trained_labels", make)


@mutant("b183-ends", case="T08/gemma4-dense/images/single", issue=f"{PULL}/3625")
def begin_and_end_of_a_picture_train(patch: pytest.MonkeyPatch) -> None:
    """What begins and ends a picture in an answer is labelled."""

    def make(original: Any) -> Any:
        def labels(ids: Any, mask: Any, processor: Any) -> Any:
            ends = (ids == processor.tokenizer.boi_token_id) | (
                ids == processor.tokenizer.eoi_token_id
            )
            return torch.where(mask & ends, ids, original(ids, mask, processor))

        return labels

    around(patch, "impl.chat:trained_labels", make)
    around(patch, "impl.multimodal_collate:media_ids", lambda original: lambda p: frozenset({0}))


@mutant("b186-rows", case="V09/qwen3_5/images/single", issue="ms-swift#8237")
def rows_and_columns_are_swapped(patch: pytest.MonkeyPatch) -> None:
    """A wide picture has the positions of a tall one."""

    def make(original: Any) -> Any:
        def index(*args: Any, **options: Any) -> Any:
            positions, deltas = original(*args, **options)
            return positions[[0, 2, 1]], deltas

        return index

    around(patch, f"{QWEN}.get_rope_index", make)


@mutant("generic-dummy", case="V11/gemma3-vlm/images/single", issue="Liger e6f84b84")
def the_dummy_picture_counts(patch: pytest.MonkeyPatch) -> None:
    """What was fed to keep the tower busy is added to the loss."""

    def make(original: Any) -> Any:
        def loss(model: Any, batch: Any, n: Any = None) -> Any:
            found = original(model, batch, n)
            return found + 0.01 * ("pixel_values" in batch)

        return loss

    around(patch, "impl.loss:loss", make)


def _turned(patch: pytest.MonkeyPatch, turn: Any) -> None:
    """Batches with their pictures through `turn`."""

    def make(original: Any) -> Any:
        def collate(*args: Any, **options: Any) -> Any:
            batch = original(*args, **options)
            if "pixel_values" in batch:
                batch["pixel_values"] = turn(batch["pixel_values"])
            return batch

        return collate

    around(patch, "impl.multimodal_collate:collate", make)


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

    def make(original: Any) -> Any:
        def decoded(part: Any, index: int) -> Any:
            from PIL import Image

            try:
                return original(part, index)
            except import_module("impl.errors").Refused:
                return {"type": "image", "image": Image.new("RGB", (24, 24), (128, 128, 128))}

        return decoded

    around(patch, "impl.pictures:decoded", make)


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

    def make(original: Any) -> Any:
        refused = import_module("impl.errors").Refused

        def sample(*args: Any, **options: Any) -> Any:
            try:
                return original(*args, **options)
            except refused as error:
                raise refused(str(error).partition(": ")[2]) from None

        return sample

    around(patch, "impl.multimodal_collate:chat_sample", make)


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

    def make(original: Any) -> Any:
        def filled(samples: Any) -> Any:
            found = original(samples)
            for sample in found:
                sample["input_features_mask"] |= True
            return found

        return filled

    around(patch, "impl.multimodal_collate:_of_one_length", make)


@mutant("b181-fixed", case="V30/gemma3n/-/single", issue=f"{ISSUE}/34625")
def a_sound_has_a_token_fewer(patch: pytest.MonkeyPatch) -> None:
    """187 places for 188 features."""

    def make(original: Any) -> Any:
        def text(*args: Any, **options: Any) -> str:
            whole: str = original(*args, **options)
            return whole.replace("<audio_soft_token>", "", 1)

        return text

    around(patch, f"{GEMMA3N}.replace_audio_token", make)
