"""A training as a launcher starts it: train, save, resume, evaluate, by the stack's own loop.

`torchrun … -m conformance.launched SPEC MODEL SETTING STRATEGY FOLDER` runs this on every rank; the
check runs the same function in one process with the ranks' batch, and compares.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

STEPS, KEPT = 4, 2
LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass
class Launched:
    """What a run left: the logged losses, the evaluation losses of the whole and of the resumed
    run, and the trained parameters of both."""

    losses: list[float]
    evaluated: list[float]
    trained: dict[str, Any] = field(default_factory=dict)
    resumed: dict[str, Any] = field(default_factory=dict)


def train(subject: Any, folder: Path, ranks: int = 1) -> Launched:
    """Four steps with a checkpoint after two; then the last two again from the checkpoint.

    ranks: over how many the batch of two rows is spread.
    """
    rows = subject.samples(count=2 * STEPS)
    plan = subject.plan()
    options = {"steps": STEPS, "batch_size": 2 // ranks, "save_steps": KEPT}
    whole = _fit(subject, plan, rows, folder / "whole", options)
    before = _evaluated(whole, rows, ranks)
    checkpoint = folder / "whole" / f"checkpoint-{KEPT}"
    again = _fit(subject, plan, rows, folder / "again", {**options, "resume": str(checkpoint)})
    losses = [float(entry["loss"]) for entry in whole.state.log_history if "loss" in entry]
    found = Launched(losses, [before, _evaluated(again, rows, ranks)])
    found.trained, found.resumed = _parameters(whole), _parameters(again)
    return found


def _fit(subject: Any, plan: Any, rows: Any, folder: Path, options: dict[str, Any]) -> Any:
    """A fresh model through the implementation's `fit`, or its `resume`."""
    from conformance import checkpoint

    built = subject.impl.build(checkpoint.checkpoint(subject.model_spec), plan)
    model = subject.adopt(built, plan, subject.case.setting.tuning != "full")
    loop = subject.impl.resume if "resume" in options else subject.impl.fit
    return loop(model, rows, plan, output_dir=folder, **options)


def _evaluated(trainer: Any, rows: Any, ranks: int) -> float:
    """The evaluation loss, two rows at a time over all ranks."""
    trainer.args.per_device_eval_batch_size = 2 // ranks
    return float(trainer.evaluate(eval_dataset=list(rows))["eval_loss"])


def _parameters(trainer: Any) -> dict[str, Any]:
    """The trained parameters of the trainer's model."""
    from conformance.spread import parameters_of

    return dict(parameters_of(trainer.model, trainable=True))


def command(launcher: str, arguments: list[str], ranks: int) -> list[str]:
    """The launcher's command line for ranks of this host: `torchrun`, or `accelerate launch` (its
    form for several devices: on a CPU it otherwise starts one process, without a word)."""
    script = ["-m", "conformance.launched", *arguments]
    if launcher == "torchrun":
        meet = ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
        run = ["-m", "torch.distributed.run", "--nproc-per-node", str(ranks), *meet]
        return [sys.executable, *run, *script]
    sizes = ["--num_processes", str(ranks), "--num_machines", "1", "--mixed_precision", "no"]
    where = ["--multi_gpu", "--main_process_port", str(free_port()), "--dynamo_backend", "no"]
    run = ["-m", "accelerate.commands.launch", *where, *sizes]
    return [sys.executable, *run, *script]


def free_port() -> int:
    """A port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def launch(launcher: str, subject: Any, folder: Path, timeout: float = 180.0) -> list[Launched]:
    """Run `train` by a launcher on the case's ranks; what each rank saw, tensors with rank 0's.

    Raises RuntimeError with the end of the output when a rank fails, TimeoutExpired when it hangs.
    """
    from safetensors.torch import load_file

    case = subject.case
    ranks = case.strategy.ranks
    arguments = [subject.loaded.spec, case.model.name, case.setting.id, case.strategy.name]
    environment = {k: v for k, v in os.environ.items() if k not in LAUNCHER}
    environment |= {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    environment |= {"OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
    done = subprocess.run(
        command(launcher, [*arguments, str(folder)], ranks),
        env=environment, capture_output=True, text=True, timeout=timeout,
    )  # fmt: skip
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.strip()]
        errors = [line for line in said if "Error" in line or "Refused" in line]
        raise RuntimeError(f"{launcher}: {(errors or said or ['?'])[0]}\n" + "\n".join(said[-60:]))
    found = [Launched(**json.loads((folder / f"{r}.json").read_text())) for r in range(ranks)]
    found[0].trained = load_file(folder / "trained.safetensors")
    found[0].resumed = load_file(folder / "resumed.safetensors")
    return found


def main() -> None:
    """One rank."""
    from safetensors.torch import save_file

    from conformance.case import Case, Check
    from conformance.families import MODELS
    from conformance.implementation import load
    from conformance.settings import Setting
    from conformance.strategies import STRATEGIES
    from conformance.subject import bound

    spec, model, setting, strategy, folder = sys.argv[1:]
    case = Case(Check("launched"), MODELS[model], Setting.parse(setting), STRATEGIES[strategy])
    rank, path = int(os.environ["RANK"]), Path(folder)
    with bound(load(spec), case, "cpu") as subject:
        seen = train(subject, path, int(os.environ["WORLD_SIZE"]))
    if rank == 0:
        save_file(seen.trained, path / "trained.safetensors")
        save_file(seen.resumed, path / "resumed.safetensors")
    numbers = {"losses": seen.losses, "evaluated": seen.evaluated}
    (path / f"{rank}.json").write_text(json.dumps(numbers))


if __name__ == "__main__":
    main()
