"""One self-contained script for a case: what one attaches to an upstream issue.

It needs torch, transformers and, for adapters, PEFT; the weights by name and the inputs are written
out, nothing of this suite is imported. It asks what the check asks (`QUESTIONS`), by equating two
ways of computing the same thing; for a check that has no question here it asks what the setting
does and says so, and prints the numbers to compare between two versions.
"""

from __future__ import annotations

import pprint
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from conformance.case import Model
from conformance.errors import InputError
from conformance.families import MODELS
from conformance.report import one_line
from conformance.settings import Setting

HERE = Path(__file__).parent
STRATEGIES = ("single", "ddp", "fsdp2")
# What the script asks for a check, on one process: names in `reproduce_questions.py.j2`.
QUESTIONS: dict[str, tuple[str, ...]] = {
    "M03": ("embeddings",),
    "M04": ("cache",),
    "M07": ("decoding",),
    "A06": ("window",),
    "A07": ("static_cache",),
    "V04": ("type_ids",),
    "V27": ("window",),
    "L01": ("items",),
    "L02": ("trainer",),
    "L03": ("trainer",),
    "L06": ("no_label",),
    "L07": ("items",),
    "L08": ("smoothing",),
    "R02": ("auxiliary",),
    "R03": ("auxiliary",),
    "R05": ("auxiliary_share",),
    "R10": ("auxiliary",),
    "P02": ("targets",),
    "P03": ("targets", "targets_of_experts"),
    "P05": ("starved",),
    "P13": ("starved",),
    "V13": ("starved",),
    "S04": ("packed_mask",),
    "C01": ("roundtrip",),
    "C02": ("roundtrip",),
    "C04": ("carried",),
    "C06": ("roundtrip",),
    "C11": ("carried",),
    "X06": ("wrapped",),
}
# What kind of samples, and how many, where it is not the setting's.
DOCUMENTS = {
    **dict.fromkeys(("L02", "L03"), ("padded", 4)),
    **dict.fromkeys(("L08", "R05"), ("padded", 2)),
    **dict.fromkeys(("M03", "M07", "A07", "L06", "L07", "V13"), ("text", 2)),
    "S04": ("packed", 3),
}
# Checks that the setting's own question answers: equal gradients with and without checkpointing,
# packing, merging, ranks; and the fingerprints.
BY_SETTING = frozenset(
    ["M01", "M05", "N01", "P07", "S01", "S03", "X20", "F01", "F02", "F14", "P17"]
)
# Modules of checks whose question needs more than torch, transformers, PEFT and a model.
OUTSIDE = {
    "test_processors": "a processor",
    "test_templates": "a tokenizer",
    "test_bad_samples": "a processor",
    "test_quick_start": "the documents of the suite",
    "test_requests": "the plans of the suite",
    "test_smoke": "an adapter of the suite",
    "test_schema": "the snapshots of the suite",
    "test_kernels": "a kernel",
    "test_launch": "a launcher",
    "test_rank_failures": "dying ranks",
    "test_quantization": "4-bit weights",
}


def script(case_id: str) -> str:
    """The script's text. Raises InputError for an id that names no case or one that needs more than
    two plain processes."""
    check, model, setting, strategy = parse(case_id)
    questions = QUESTIONS.get(check, ()) if strategy == "single" or check == "X06" else ()
    documents = _documents(model, setting, check)
    packages = ["torch", "transformers"]
    packages += ["peft"] if setting.tuning != "full" or "targets" in questions else []
    packages += ["accelerate"] if {"trainer", "smoothing"} & set(questions) else []
    text: str = _template().render(
        case_id=case_id,
        claim=_claim(check),
        model=model,
        config=pprint.pformat(_plain(model.tiny), width=96, sort_dicts=False),
        setting=setting,
        tokens=setting.tokens,
        strategy=strategy,
        documents=pprint.pformat(documents, width=96, compact=True, sort_dicts=False),
        weights=_weights_source(),
        questions=questions,
        asked=bool(questions) or check in BY_SETTING,
        freeze=repr(set(model.freeze)) if model.freeze else "set()",
        packages=packages,
        attention=_attention(model, documents),
    )
    return text


def parse(case_id: str) -> tuple[str, Model, Setting, str]:
    """The parts of a case id. Raises InputError naming the part that is unknown."""
    parts = case_id.split("/")
    if len(parts) != 4:
        raise InputError(f"{one_line(case_id, 80)!r} is no case id: check/model/setting/strategy")
    check, name, tokens, strategy = parts
    if name == "-":
        raise InputError(f"{one_line(case_id, 80)}: the check has no model; run it with --case")
    if name not in MODELS:
        raise InputError(f"unknown model {one_line(name, 80)!r}; known: {', '.join(MODELS)}")
    try:
        setting = Setting.parse(tokens)
    except ValueError as error:
        raise InputError(one_line(str(error), 300)) from None
    if setting.tuning == "qlora":
        raise InputError("4-bit weights need bitsandbytes: no script is written; use --case")
    if strategy not in STRATEGIES:
        raise InputError(
            f"strategy {one_line(strategy, 40)!r}: a script is written for"
            f" {', '.join(STRATEGIES)}; repeat the case with --case"
        )
    if not check.isalnum() or not check.isascii():
        raise InputError(f"{one_line(check, 40)!r} is no check's id, such as M05")
    return check, MODELS[name], setting, strategy


def _claim(check: str) -> tuple[str, str]:
    """The check's claim and motivation where the check modules can be imported."""
    try:
        from conformance.catalogue import checks

        known = checks()
    except Exception:  # an environment without torch, or a version that breaks a check module
        return "", ""
    found = known.get(check)
    if found is None:
        raise InputError(
            f"unknown check {one_line(check, 40)!r}; `conformance catalogue` lists them"
        )
    module = found[1].__module__.rpartition(".")[2]
    if module in OUTSIDE and check not in QUESTIONS and check not in BY_SETTING:
        raise InputError(
            f"check {check} asks about {OUTSIDE[module]}, which torch, transformers and PEFT alone"
            " do not have; repeat the case with --case"
        )
    return found[0].claim, found[0].motivation


def _plain(value: Any) -> Any:
    """Mappings and tuples as dicts and lists."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value


def _documents(model: Model, setting: Setting, check: str) -> list[dict[str, Any]]:
    """The case's samples: integer tensors as lists, floating ones as shapes to be drawn."""
    from conformance.batches import samples

    kind, count = DOCUMENTS.get(check, (setting.batch, 2))
    if check in ("L02", "L03") and setting.batch == "images":
        kind = "mixed"
    try:
        found = samples(model, kind, count=count)
    except ValueError as error:
        raise InputError(one_line(str(error), 300)) from None
    return [
        {
            name: ("noise", tuple(tensor.shape)) if tensor.is_floating_point() else tensor.tolist()
            for name, tensor in sample.items()
        }
        for sample in found
    ]


def _attention(model: Model, documents: list[dict[str, Any]]) -> dict[str, str] | str:
    """Eager, but where samples are padded: eager attention turns a padded query that sees nothing
    into NaN in float64. Towers of sound have no other."""
    if len({len(document["input_ids"]) for document in documents}) == 1:
        return "eager"
    parts = [name for name in model.tiny if name.endswith("_config")]
    return dict.fromkeys(parts, "eager") | {"text_config": "sdpa"} if parts else "sdpa"


def _weights_source() -> str:
    """`weights.py` without its heading: it needs torch and the standard library alone."""
    text = (HERE / "weights.py").read_text(encoding="utf-8")
    body = text.partition('"""')[2].partition('"""')[2]
    return body.replace("from __future__ import annotations\n", "").strip()


@cache
def _template() -> Any:
    environment = Environment(
        loader=FileSystemLoader(HERE),
        undefined=StrictUndefined,
        autoescape=False,  # Python, not markup; every value is our own data or checked above
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template("reproduce.py.j2")
