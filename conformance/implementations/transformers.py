"""The stock stack, used as its own documentation tells a user to: transformers, PEFT, HF Trainer.

Its known failures are in `transformers_expectations.py` beside this file.
"""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from conformance.implementation import Capability, Exclusion
from conformance.implementations import transformers_parallel as spread
from conformance.implementations.transformers_expectations import EXPECTATIONS
from conformance.implementations.transformers_parallel import NotInThisVersion

EXPERT_PARAMETERS = ("experts.gate_up_proj", "experts.down_proj")


@dataclass(frozen=True)
class StockDecision:
    """A value of the documentation's quick starts."""

    value: Any
    reason: str = "documented default"


@dataclass(frozen=True)
class StockPlan:
    """What a user of the stock stack writes down."""

    setting: Any
    strategy: str
    options: Mapping[str, Any]
    decisions: Mapping[str, StockDecision]
    warnings: tuple[str, ...] = field(default=())


class StockTransformers:
    """transformers + PEFT + accelerate as shipped."""

    name = "transformers"
    capabilities = (
        Capability(
            "plan",
            excludes=(
                Exclusion(
                    "the stock stack has no switch that freezes towers; a user sets requires_grad",
                    checks=frozenset({"V06", "V12"}),
                ),
                Exclusion(
                    "the stock stack plans no data set settings; a user knows them or not",
                    checks=frozenset({"V17", "V19", "V20"}),
                ),
                Exclusion(
                    "the stock stack takes the checkpointing mode that it is given, and says so"
                    " nowhere: what that does to shared keys and values is M05's",
                    checks=frozenset({"X08"}),
                ),
                Exclusion(
                    "the stock stack's default LoRA targets are a list or `all-linear`, no pattern",
                    checks=frozenset({"X10"}),
                ),
            ),
        ),
        Capability("build"),
        Capability(
            "prepare",
            excludes=(
                Exclusion(
                    "stock transformers has no fused loss or experts kernel to switch on",
                    settings=frozenset({"kernels"}),
                ),
                Exclusion(
                    "stock transformers has no activation offloading; TRL and axolotl add it",
                    settings=frozenset(
                        {"offload", "offload-legacy", "offload-disk", "offload-hidden_states"}
                    ),
                ),
            ),
        ),
        Capability(
            "parallelize",
            excludes=(
                Exclusion(
                    "accelerate's context parallel is torch's ring attention: no CPU kernel, and a"
                    " hook that drops every mask (accelerate#4177), so causal full attention only",
                    strategies=frozenset({"cp"}),
                ),
            ),
        ),
        Capability(
            "collate",
            excludes=(
                Exclusion(
                    "the stock stack's packing collator (DataCollatorWithFlattening) takes text"
                    " only",
                    checks=frozenset({"S07"}),
                ),
            ),
        ),
        Capability(
            "chat",
            excludes=(
                Exclusion(
                    "what trains is what the template marks as generated; nothing chooses roles",
                    checks=frozenset({"T09"}),
                ),
            ),
        ),
        Capability("loss"),
        Capability("fit"),
        Capability("save"),
        Capability("load"),
        Capability("resume"),
        Capability("merge"),
    )
    expectations = EXPECTATIONS
    refusals: tuple[type[BaseException], ...] = (NotInThisVersion,)

    def plan(self, config: Any, setting: Any, strategy: str, **options: Any) -> StockPlan:
        """The quick starts' values: adapters on all linear layers, checkpointing as asked."""
        kwargs = None
        if setting.checkpointing != "off":
            kwargs = {"use_reentrant": setting.checkpointing == "reentrant"}
        values = {
            "gradient_checkpointing": setting.checkpointing != "off",
            "gradient_checkpointing_kwargs": kwargs,
            "lora_target_modules": options.get("lora_targets", "all-linear"),
            "lora_target_parameters": options.get("lora_target_parameters", list(EXPERT_PARAMETERS))
            if setting.tuning == "lora-experts" or "lora_target_parameters" in options
            else [],
            "sample_packing": setting.batch == "packed",
        }
        if "attn_implementation" in options:
            values["attn_implementation"] = options["attn_implementation"]
        decisions = {name: StockDecision(value) for name, value in values.items()}
        if strategy != "single":
            decisions.update(self._spreading(config, setting, strategy, options))
        return StockPlan(setting, strategy, dict(options), decisions)

    def _spreading(
        self, config: Any, setting: Any, strategy: str, options: Mapping[str, Any]
    ) -> dict[str, StockDecision]:
        """What Trainer and accelerate choose when the user names a strategy and nothing else."""
        plain = setting.tuning == "full"
        found = {
            "freeze_mm_modules": StockDecision(False, "the stock stack has no such switch"),
            "ddp_find_unused_parameters": StockDecision(
                not (plain and setting.checkpointing != "off"),
                "Trainer: False if a plain model is checkpointed, True otherwise",
            ),
        }
        if strategy in spread.FSDP_VERSION:
            named = options.get("fsdp_transformer_layer_cls_to_wrap")
            value = {
                "fsdp_version": spread.FSDP_VERSION[strategy],
                "fsdp_transformer_layer_cls_to_wrap": named or spread.default_wrap_classes(config),
                "state_dict_type": "FULL_STATE_DICT",
                "cpu_ram_efficient_loading": bool(options.get("cpu_ram_efficient_loading")),
            }
            reason = "accelerate wraps the model's `_no_split_modules` when no class is named"
            found["fsdp_config"] = StockDecision(value, reason)
            classes = value["fsdp_transformer_layer_cls_to_wrap"]
            found["fsdp_transformer_layer_cls_to_wrap"] = StockDecision(classes, reason)
        return found

    def build(self, path: Path, plan: StockPlan, mesh: Any = None) -> Any:
        """`from_pretrained` of the class that the checkpoint names."""
        import torch
        import transformers

        config = transformers.AutoConfig.from_pretrained(path)
        model_class = getattr(transformers, config.architectures[0])
        options: dict[str, Any] = {"dtype": getattr(torch, plan.setting.dtype)}
        if plan.setting.dtype == "float64":
            options["experts_implementation"] = "eager"  # grouped_mm refuses float64
        if plan.setting.tuning == "qlora":
            options["quantization_config"] = transformers.BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type="nf4",
                bnb_4bit_compute_dtype=options["dtype"],
            )
        if "attn_implementation" in plan.options:
            options["attn_implementation"] = plan.options["attn_implementation"]
        options.update(spread.sharding_options(plan, spread.ranks()))
        return model_class.from_pretrained(path, **options)

    def build_key(self, plan: StockPlan) -> Any:
        """What `build` reads of a plan; None where transformers shards while loading."""
        if plan.strategy in spread.SHARDED_WHILE_LOADING:
            return None
        attention = plan.options.get("attn_implementation")
        return (plan.setting.dtype, plan.setting.tuning == "qlora", attention)

    def prepare(self, model: Any, plan: StockPlan) -> Any:
        """Checkpointing by the model's own switch, adapters by PEFT, no cache (as Trainer does)."""
        model.config.use_cache = False
        if plan.options.get("auxiliary_loss"):
            model.config.get_text_config().output_router_logits = True
        checkpointing = plan.decisions["gradient_checkpointing_kwargs"].value
        if checkpointing is not None:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=checkpointing)
        if plan.setting.tuning == "full":
            return model
        import peft

        if checkpointing is not None:
            model.enable_input_require_grads()
        parameters = plan.decisions["lora_target_parameters"].value
        config = peft.LoraConfig(
            r=plan.options.get("lora_r", 4),
            lora_alpha=plan.options.get("lora_alpha", 8),
            rank_pattern=plan.options.get("rank_pattern", {}),
            alpha_pattern=plan.options.get("alpha_pattern", {}),
            lora_dropout=plan.options.get("lora_dropout", 0.0),
            use_rslora=plan.options.get("use_rslora", False),
            target_modules=plan.decisions["lora_target_modules"].value,
            target_parameters=parameters or None,
            modules_to_save=plan.options.get("modules_to_save"),
            task_type="CAUSAL_LM",
        )
        return peft.get_peft_model(model, config)

    def undo(self, model: Any) -> None:
        """Nothing global was done."""

    def parallelize(self, model: Any, plan: StockPlan, mesh: Any) -> Any:
        """Spread through accelerate, as its users do."""
        return spread.parallelize(model, plan, mesh)

    def clip_grad_norm(self, model: Any, max_norm: float) -> Any:
        """By accelerate, of a spread model; the norm before."""
        return spread.clip_grad_norm(model, max_norm)

    def no_sync(self, model: Any) -> Any:
        """accelerate's context: backward passes inside accumulate locally."""
        return spread.no_sync(model)

    def collate(self, samples: Sequence[Mapping[str, Any]], plan: StockPlan) -> dict[str, Any]:
        """The documented collators: flattening for packed rows, padding otherwise."""
        from conformance import batches

        if plan.setting.batch != "packed":
            return batches.stack([dict(sample) for sample in samples])
        from transformers import DataCollatorWithFlattening

        rows = [
            {"input_ids": list(map(int, s["input_ids"])), "labels": list(map(int, s["labels"]))}
            for s in samples
        ]
        return dict(DataCollatorWithFlattening(return_position_ids=True)(rows))

    def chat(self, conversations: Sequence[Any], processor: Any, plan: StockPlan) -> dict[str, Any]:
        """The whole batch through the template at once, as the documentation has it: its assistant
        mask makes the labels."""
        padding: dict[str, Any] = {"padding": True}
        if hasattr(processor, "image_processor"):
            padding = {"processor_kwargs": padding}
        batch = processor.apply_chat_template(
            [[dict(message) for message in messages] for messages in conversations],
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            return_assistant_tokens_mask=True,
            **padding,
        )
        trained = batch.pop("assistant_masks")
        labels = batch["input_ids"].masked_fill(trained == 0, -100)
        return {**batch, "labels": labels}

    def loss(self, model: Any, batch: Mapping[str, Any], num_items_in_batch: Any = None) -> Any:
        """The model's own loss."""
        extra = {} if num_items_in_batch is None else {"num_items_in_batch": num_items_in_batch}
        return model(**batch, **extra).loss

    def fit(self, model: Any, samples: Sequence[Any], plan: StockPlan, **options: Any) -> Any:
        """HF `Trainer` with its defaults, but for what makes two runs comparable."""
        import transformers

        processor = options.get("processor")
        directory = options.get("output_dir") or tempfile.mkdtemp(prefix="conformance-fit-")
        arguments = transformers.TrainingArguments(
            output_dir=str(directory),
            max_steps=options["steps"],
            per_device_train_batch_size=options.get("batch_size", 1),
            gradient_accumulation_steps=options.get("accumulation", 1),
            learning_rate=options.get("lr", 1e-3),
            lr_scheduler_type=options.get("schedule", "constant"),
            max_grad_norm=options.get("max_grad_norm", 0.0),
            label_smoothing_factor=options.get("label_smoothing", 0.0),
            save_strategy="steps" if options.get("save_steps") else "no",
            save_steps=options.get("save_steps") or 500,
            logging_steps=1,
            report_to=[],
            use_cpu=next(model.parameters()).device.type == "cpu",
            disable_tqdm=True,
            remove_unused_columns=options.get("remove_unused_columns", processor is None),
            train_sampling_strategy=options.get("sampling", "sequential"),
            seed=0,
        )
        trainer = transformers.Trainer(
            model=model,
            args=arguments,
            train_dataset=list(samples),
            data_collator=(
                (lambda rows: self.collate(rows, plan))
                if processor is None
                else (lambda rows: self.chat(rows, processor, plan))
            ),
        )
        if not options.get("output_dir"):  # the trainer is read, and evaluates, after its training
            weakref.finalize(trainer, shutil.rmtree, directory, ignore_errors=True)
        trainer.train(resume_from_checkpoint=options.get("resume"))
        return trainer

    def resume(self, model: Any, samples: Sequence[Any], plan: StockPlan, **options: Any) -> Any:
        """`Trainer.train(resume_from_checkpoint=...)`."""
        return self.fit(model, samples, plan, **options)

    def save(self, model: Any, path: Path) -> None:
        """`save_pretrained`, of the whole model gathered by accelerate where it was spread."""
        spread.save(model, path)

    def load(self, model: Any, path: Path) -> Any:
        """`PeftModel.from_pretrained`, into the same adapters again as Trainer resumes, or the
        model's own class."""
        import peft

        if (Path(path) / "adapter_config.json").exists():
            if isinstance(model, peft.PeftModel):
                model.load_adapter(str(path), model.active_adapter, is_trainable=True)
                return model
            return peft.PeftModel.from_pretrained(model, path, is_trainable=True)
        return type(model).from_pretrained(path, dtype=model.dtype)

    def merge(self, model: Any) -> Any:
        """`merge_and_unload`."""
        return model.merge_and_unload()


IMPLEMENTATION = StockTransformers()
