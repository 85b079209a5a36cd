"""Training through HF Trainer, set up so that it trains what the plan says."""

from __future__ import annotations

import inspect
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Sampler, SequentialSampler
from transformers import Trainer, TrainingArguments

from .adapter_layout import mend_file
from .checkpoints import load, load_weights
from .collate import collate, label_free_ids
from .errors import Refused
from .loss import count_items, loss, loss_and_outputs
from .model_facts import device_of, is_adapted, text_config, unwrap, without_parallel
from .multimodal_collate import collate_conversations
from .prepare import prepare
from .prepared import state_of
from .training_plan import TrainingPlan


def no_resume_on_cpu_ranks() -> str | None:
    """Why Trainer cannot resume on several CPU ranks, or None where it can: it reads the optimizer
    to the rank's own device, there `cpu:0`, which `torch.load` does not know."""
    source = inspect.getsource(Trainer._load_optimizer_and_scheduler)
    if "map_location = self.args.device if" in source:
        return (
            "this transformers' Trainer cannot resume on CPU ranks: it loads the optimizer to cpu:0"
        )
    return None


class TokenWeightedTrainer(Trainer):
    """Trainer whose every micro-batch counts by its labelled tokens, in the order of the samples.

    A checkpoint is read as it was written (`checkpoints.load`), loudly.
    """

    loss_is_scaled_for_ga = True  # by the number of tokens of the whole accumulation window
    smoothing = 0.0

    def __init__(self, *args: Any, smoothing: float = 0.0, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.model_accepts_loss_kwargs = True  # of `loss`, whatever the class says (L2)
        # transformers 5.5 tells accelerate of the accumulation, which divides the loss once more
        self.accelerator.gradient_accumulation_steps = 1
        self.smoothing = smoothing

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """The loss of `impl.loss`, times the ranks, since their gradients are averaged."""
        ranks = self.accelerator.num_processes if num_items_in_batch is not None else 1
        if return_outputs:  # in evaluation, where the ranks' losses are averaged as well
            value, outputs = loss_and_outputs(model, inputs, num_items_in_batch)
            return (value * ranks if ranks > 1 else value), outputs
        value = loss(model, inputs, num_items_in_batch, label_smoothing=self.smoothing)
        return value * ranks if ranks > 1 else value

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Tensor:
        counts = [count_items(batch) for batch in batch_samples]
        total = torch.stack(counts).sum().to(device) if counts else torch.zeros((), device=device)
        if self.args.world_size > 1:
            total = self.accelerator.gather(total.reshape(1)).sum()
        return total

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        return SequentialSampler(dataset)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        super()._save(output_dir, state_dict)
        if is_adapted(self.model):
            mend_file(without_parallel(self.model), Path(output_dir or self.args.output_dir))

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        target = self.model if model is None else model
        if is_adapted(target):
            load(target, resume_from_checkpoint)
        else:
            load_weights(target, Path(resume_from_checkpoint))


def fit(
    model: nn.Module,
    samples: Sequence[Any],
    plan: TrainingPlan,
    *,
    steps: int,
    batch_size: int = 1,
    accumulation: int = 1,
    lr: float = 1e-3,
    schedule: str = "constant",
    output_dir: Path | str | None = None,
    resume: Path | str | None = None,
    save_steps: int | None = None,
    max_grad_norm: float = 0.0,
    label_smoothing: float = 0.0,
    seed: int = 0,
    processor: Any = None,
) -> Trainer:
    """Train for `steps` optimizer steps over the samples in their order, again from the start at
    their end; returns the Trainer (`state.log_history` holds the losses).

    A model that is not prepared is prepared by the plan (the trainer's `model` is the result).
    accumulation: micro-batches a step, each weighted by its labelled tokens, in a last, shorter
    window too. resume: a checkpoint directory written with `save_steps`; `steps` as in the first
    run. max_grad_norm: 0 does not clip. Without output_dir nothing is kept. processor: then samples
    are conversations (sequences of messages), and each batch is made by it when it is needed
    (`collate_conversations`); a bad one ends the run before the step, naming its sample.
    """
    if steps < 1 or batch_size < 1 or accumulation < 1:
        raise Refused("fit: steps, batch_size and accumulation must be positive")
    if not samples:
        raise Refused("fit: there are no samples")
    _check_kind(samples, processor)
    ready = model if state_of(model) is not None else prepare(model, plan)
    if resume is not None and not Path(resume).is_dir():
        raise Refused(f"fit: no checkpoint directory {resume}")
    config = unwrap(ready).config
    with tempfile.TemporaryDirectory(prefix="fit-") as scratch:
        arguments = TrainingArguments(
            output_dir=str(output_dir or scratch),
            max_steps=steps,
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=accumulation,
            learning_rate=lr,
            lr_scheduler_type=schedule,
            max_grad_norm=max_grad_norm,
            save_strategy="steps" if save_steps else "no",
            save_steps=save_steps or 500,
            logging_steps=1,
            report_to=[],
            disable_tqdm=True,
            remove_unused_columns=False,  # it would drop the pixels
            dataloader_pin_memory=device_of(ready).type == "cuda",
            use_cpu=device_of(ready).type == "cpu",
            seed=seed,
        )
        trainer = TokenWeightedTrainer(
            model=ready,
            args=arguments,
            train_dataset=list(samples if processor is None else enumerate(samples)),
            data_collator=_collator(ready, plan, processor),
            smoothing=label_smoothing,
        )
        _train(trainer, config, None if resume is None else str(resume))
    return trainer


def _check_kind(samples: Sequence[Any], processor: Any) -> None:
    """Refused: a sample that is no mapping, or with a processor no sequence of messages."""
    for number, sample in enumerate(samples):
        if processor is None and not isinstance(sample, Mapping):
            kind = type(sample).__name__
            raise Refused(f"fit: sample {number} is a {kind}; conversations need processor=")
        messages = sample if isinstance(sample, list | tuple) else [None]
        if processor is not None and not all(isinstance(m, Mapping) for m in messages):
            raise Refused(f"fit: sample {number} is no conversation, a list of messages")


def _collator(model: nn.Module, plan: TrainingPlan, processor: Any) -> Any:
    """Rows to a batch: samples as they are, or numbered conversations through the processor."""
    pad_id = getattr(text_config(model), "pad_token_id", None) or 0
    ignored = label_free_ids(unwrap(model).config)

    def together(rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        return collate(rows, plan, pad_id=pad_id, ignored_ids=ignored)

    def spoken(rows: Sequence[tuple[int, Any]]) -> dict[str, Tensor]:
        numbers, conversations = zip(*rows, strict=True)
        return collate_conversations(conversations, processor, plan, indices=numbers)

    return together if processor is None else spoken


def _train(trainer: Trainer, config: Any, resume: str | None) -> None:
    """Run it; Trainer writes `use_cache` into the model's config, which is given back."""
    before = getattr(config, "use_cache", None)
    try:
        trainer.train(resume_from_checkpoint=resume)
    finally:
        if before is not None:
            config.use_cache = before
