"""One self-contained script for a case: what one attaches to an upstream issue.

It needs torch, transformers and, for adapters, PEFT; the weights by name and the inputs are written
out, nothing of this suite is imported. It shows the behaviour that the case asks about by equating
two ways of computing the same thing, and prints the numbers to compare between two versions.
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


def script(case_id: str) -> str:
    """The script's text. Raises InputError for an id that names no case or one that needs more than
    two plain processes."""
    check, model, setting, strategy = parse(case_id)
    documents = _documents(model, setting)
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

        found = checks().get(check)
    except Exception:
        return "", ""
    if found is None:
        raise InputError(
            f"unknown check {one_line(check, 40)!r}; `conformance catalogue` lists them"
        )
    return found[0].claim, found[0].motivation


def _plain(value: Any) -> Any:
    """Mappings and tuples as dicts and lists."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value


def _documents(model: Model, setting: Setting) -> list[dict[str, Any]]:
    """The case's samples: integer tensors as lists, floating ones as shapes to be drawn."""
    from conformance.batches import samples

    try:
        found = samples(model, setting.batch)
    except ValueError as error:
        raise InputError(one_line(str(error), 300)) from None
    return [
        {
            name: ("noise", tuple(tensor.shape)) if tensor.is_floating_point() else tensor.tolist()
            for name, tensor in sample.items()
        }
        for sample in found
    ]


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
