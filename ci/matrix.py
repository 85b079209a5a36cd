"""The nightly matrix as JSON: family × strategy shards, out of the data that the suite uses.

    python ci/matrix.py                 every shard
    python ci/matrix.py --runner cpu    those that fit on that kind of machine
    python ci/matrix.py --check         do the shards cover the matrix exactly?

A shard is the cases of one family under one strategy (`case_globs`); cases without a model are the
shard `suite`. Several GPUs are asked for where a strategy has ranks; on CPU, ranks are processes.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

SUITE = "suite"
Shard = dict[str, Any]


def families() -> dict[str, list[str]]:
    """Family -> names of its models."""
    from conformance.families import MODELS

    found: dict[str, list[str]] = {}
    for model in MODELS.values():
        found.setdefault(model.family, []).append(model.name)
    return found


def applies(family: str, strategy: str) -> bool:
    """Whether some model of the family can be spread so."""
    from conformance.families import MODELS
    from conformance.strategies import STRATEGIES

    models = [model for model in MODELS.values() if model.family == family]
    return any(STRATEGIES[strategy].applies_to(model.traits) for model in models)


def shards() -> list[Shard]:
    """Every shard: family, strategy, the globs of its case ids, ranks, and its name."""
    from conformance.strategies import STRATEGIES

    found: list[Shard] = [
        {"name": SUITE, "family": "-", "strategy": "-", "ranks": 1, "cases": ["*/-/*/-"]}
    ]
    for family, models in families().items():
        for strategy in STRATEGIES.values():
            if applies(family, strategy.name):
                globs = [f"*/{model}/*/{strategy.name}" for model in models]
                found.append(
                    {
                        "name": f"{family}-{strategy.name}",
                        "family": family,
                        "strategy": strategy.name,
                        "ranks": strategy.ranks,
                        "cases": globs,
                    }
                )
    return found


def include(chosen: Iterable[Shard], runner: str) -> Mapping[str, list[Shard]]:
    """The `matrix` of a workflow: each shard with its pytest options and the GPUs that it needs."""
    return {
        "include": [
            {
                **{name: value for name, value in shard.items() if name != "cases"},
                "options": " ".join(f"--case={glob}" for glob in shard["cases"]),
                "gpus": 0 if runner == "cpu" else shard["ranks"],
                "runner": runner if runner == "cpu" else f"gpu-{shard['ranks']}",
            }
            for shard in chosen
        ]
    }


def faults(matrix: str = "full") -> list[str]:
    """Case ids that lie in no shard or in several."""
    from conformance.catalogue import checks
    from conformance.matrix import cases

    known = shards()
    wrong = []
    for case_id in {case.id for check, _ in checks().values() for case in cases(check, matrix)}:
        found = [s["name"] for s in known if any(fnmatchcase(case_id, g) for g in s["cases"])]
        if len(found) != 1:
            wrong.append(f"{case_id} lies in {len(found)} shards: {', '.join(found)}")
    return sorted(wrong)


def main() -> int:
    """Print the matrix, or check it; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runner", choices=("cpu", "gpu"), default="cpu")
    parser.add_argument("--family", action="append", help="only these families")
    parser.add_argument("--check", action="store_true", help="do they cover the matrix exactly?")
    arguments = parser.parse_args()
    if arguments.check:
        found = faults()
        print("\n".join(found) or "every case lies in exactly one shard")
        return int(bool(found))
    chosen = [s for s in shards() if not arguments.family or s["family"] in arguments.family]
    print(json.dumps(include(chosen, arguments.runner)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
