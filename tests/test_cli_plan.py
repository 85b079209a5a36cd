"""`conformance plan`: output that can be used, and one line for every mistake."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import typer
import yaml
from typer.testing import CliRunner

from conformance.checkpoint import build_config
from conformance.cli_plan import plan_command
from conformance.families import MODELS
from conformance.strategies import STRATEGIES

ROOT = Path(__file__).parents[1]
PUBLISHED = ROOT / "fixtures" / "published"
E2B, QWEN = str(PUBLISHED / "gemma4-e2b.json"), str(PUBLISHED / "qwen3.5-35b-a3b.json")

app = typer.Typer()
app.command()(plan_command)


def run(*args: str) -> tuple[int, str, str]:
    """Exit status, stdout, stderr."""
    result = CliRunner().invoke(app, list(args))
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.stdout, result.stderr


def test_yaml() -> None:
    """The default is YAML that reads back, the reasons as comments."""
    status, out, _ = run(E2B, "--setting", "bf16+lora+ckpt-nonreentrant", "--strategy", "fsdp2")
    assert status == 0
    config = yaml.safe_load(out)
    assert config["fsdp_config"]["fsdp_transformer_layer_cls_to_wrap"] == "Gemma4TextDecoderLayer"
    assert config["gradient_checkpointing_kwargs"] == {"use_reentrant": False}
    assert "# " in out


def test_json_and_args() -> None:
    """JSON has the specification's names with reasons; args are Python calls."""
    status, out, _ = run(QWEN, "--format", "json", "-o", "lora_r=32", "--setting", "bf16+lora")
    assert status == 0
    body = json.loads(out)
    assert body["lora_r"] == {"value": 32, "reason": "as asked for"}
    assert body["normalize_weight_scales"]["reason"]
    status, out, _ = run(QWEN, "--format", "args")
    assert status == 0
    assert "LoraConfig(" in out


def test_explain() -> None:
    """The deviations are added, as comments where the output is piped."""
    status, out, _ = run(E2B, "--strategy", "ddp", "--explain")
    assert status == 0
    assert "specification:" in out
    assert yaml.safe_load(out)["ddp_find_unused_parameters"] is True


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "no such file"),
        ("not json", "not JSON"),
        ("[1]", "not a JSON object"),
        ("{}", "no model_type"),
        ('{"model_type": "orchid", "hidden_size": 8, "num_hidden_layers": 1, "vocab_size": 9}',
         "unknown to the installed transformers"),
        ('{"model_type": "mixtral", "hidden_size": -1}', "hidden_size"),
        ('{"model_type": "mixtral", "num_hidden_layers": 1e9}', "num_hidden_layers"),
        ('{"model_type": "mixtral", "vocab_size": [1]}', "vocab_size"),
        ('{"model_type": "mixtral", "num_attention_heads": 7}', "heads"),
        ('{"model_type": "t5"}', "encoder-decoder"),
        ('{"model_type": "gemma4", "text_config": 7}', "gemma4"),
        ('{"model_type": "gemma4", "text_config": {"num_experts": "a"}}', "num_experts"),
        ('{"model_type": "[red]x"}', "hidden_size"),
        ("[" * 100_000, "JSON"),
    ],
)  # fmt: skip
def test_bad_config(tmp_path: Path, content: str | None, says: str) -> None:
    """A config that cannot be planned for: one line on stderr, status 2, no traceback."""
    path = tmp_path / "config.json"
    if content is not None:
        path.write_text(content)
    status, out, err = run(str(path))
    assert status == 2, err
    assert out == ""
    assert says in err
    assert len(err.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("args", "says", "status"),
    [
        (("--setting", "lora+nonsense"), "nonsense", 2),
        (("--setting", "packed+lora"), "order", 2),
        (("--strategy", "zero4"), "zero4", 2),
        (("--format", "toml"), "toml", 2),
        (("-o", "lora_r"), "KEY=VALUE", 2),
        (("-o", "magic=1"), "magic", 2),
        (("-o", "lora_r=many"), "lora_r", 2),
        (("-o", "auto_class=Nonsense"), "Nonsense", 2),
        (("--strategy", "fsdp1"), "refused: fsdp1 with adapters", 1),
        (("--setting", "lora-experts"), "refused: expert LoRA", 1),
    ],
)
def test_bad_options(args: tuple[str, ...], says: str, status: int) -> None:
    """A mistaken option and a refusal: one line, different status."""
    got, _, err = run(E2B, *args)
    assert got == status, err
    assert says in err
    assert len(err.strip().splitlines()) == 1


def test_compare_strategies(tmp_path: Path) -> None:
    """Every strategy is ranked by memory or refused with its reason."""
    config = build_config(MODELS["gemma4-moe"])
    config.save_pretrained(tmp_path)
    asked = ("--compare-strategies", "-o", "ranks=2", "--tokens", "32", "--setting", "bf16+lora")
    status, out, err = run(str(tmp_path), *asked, "--format", "json")
    assert status == 0, err
    found = {row["strategy"]: row for row in json.loads(out)}
    assert set(found) == set(STRATEGIES)
    assert found["fsdp1"]["refused"]
    totals = [row["total"] for row in json.loads(out) if not row["refused"]]
    assert totals == sorted(totals)
    status, out, _ = run(str(tmp_path), *asked)
    assert status == 0
    assert "fsdp2" in out
    status, _, err = run(str(tmp_path), *asked, "-o", "lora_r=3")
    assert status == 2
    assert "lora_r" in err


@pytest.mark.parametrize("name", ["gemma3-text", "qwen3_5"])
def test_compare_strategies_without_experts(name: str, tmp_path: Path) -> None:
    """Classes of newer releases all have `set_experts_implementation`; dense ones refuse it."""
    build_config(MODELS[name]).save_pretrained(tmp_path)
    status, out, err = run(str(tmp_path), "--compare-strategies", "-o", "ranks=2", "--tokens", "32")
    assert status == 0, err
    assert "activations" in out and "refused: fsdp2_ep: " in out
    assert "fsdp2_ep: fsdp2_ep" not in out and "tp: tp:" not in out


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"GGUF\x03\x00\x00\x00", "holds weights or other data"),
        (b" " * ((1 << 24) + 1), "holds weights or other data"),
        (b'{"model_type": "frobnicate"}', "config has no hidden_size"),
        (b'{"model_type": "mixtral", "hidden_size": "4096"}', "hidden_size is '4096'"),
    ],
)
def test_files_that_are_no_config(content: bytes, says: str, tmp_path: Path) -> None:
    """One line, which names the file."""
    path = tmp_path / "given"
    path.write_bytes(content)
    status, _, err = run(str(path))
    assert status == 2
    assert says in err and err.startswith(f"{path}: ")
    assert len(err.strip().splitlines()) == 1


def test_byte_order_mark(tmp_path: Path) -> None:
    """As some editors write it."""
    path = tmp_path / "config.json"
    path.write_bytes(b"\xef\xbb\xbf" + Path(E2B).read_bytes())
    assert run(str(path))[0] == 0


def test_help_imports_no_torch() -> None:
    """`--help` pays for neither torch nor transformers."""
    code = (
        "import sys, typer; from conformance.cli_plan import plan_command\n"
        "app = typer.Typer(); app.command()(plan_command)\n"
        "try: app(['--help'])\nexcept SystemExit: pass\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--strategy" in done.stdout
