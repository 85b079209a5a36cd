"""Activation offloading on one GPU: peak memory, time, gradients, and a race stress (O03, O05).

    python -m conformance.benchmarks.bench_offload --out FILE.json

A Gemma-4-shaped text model with random weights trains one step a mode. Each mode's gradients must
equal those without offloading bit for bit, again and again while another stream keeps the copy
engine and the allocator busy: a missing wait between streams shows as another number.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
from torch import nn

from conformance.benchmarks.records import versions

MODES: tuple[bool | str | None, ...] = (None, True, "legacy", "disk", "hidden_states")


def build(layers: int, width: int) -> nn.Module:
    """A dense Gemma 4 decoder in bfloat16 on the GPU, checkpointing off."""
    from transformers import Gemma4ForCausalLM, Gemma4TextConfig

    config = Gemma4TextConfig(
        vocab_size=8192,
        vocab_size_per_layer_input=8192,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        global_head_dim=256,
        hidden_size_per_layer_input=0,
        sliding_window=1024,
    )
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.manual_seed(0)
    # eager: the fused attention's backward is not deterministic, so bits could not be compared
    return (
        Gemma4ForCausalLM._from_config(config, attn_implementation="eager")
        .to("cuda", torch.bfloat16)
        .train()
    )


def step(model: nn.Module, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """One forward and backward; the gradients."""
    model.zero_grad(set_to_none=True)
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def measure(mode: bool | str | None, rounds: int, layers: int, width: int, tokens: int) -> dict:
    """Peak bytes of a step beyond weights and gradients, seconds a step, and rounds that differed
    from a step without offloading on the same checkpointing."""
    from impl.activation_offload import enable

    model = build(layers, width)
    if mode == "hidden_states":
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    ids = torch.randint(0, 8000, (1, tokens), device="cuda")
    step(model, ids)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    want = step(model, ids)
    plain = torch.cuda.max_memory_allocated() - before
    undo = enable(model, mode) if mode is not None else None
    step(model, ids)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    started = time.monotonic()
    step(model, ids)
    torch.cuda.synchronize()
    seconds = time.monotonic() - started
    peak = torch.cuda.max_memory_allocated() - before
    wrong = stress(model, ids, want, rounds)
    if undo:
        undo()
    return {
        "mode": str(mode),
        "checkpointing": mode == "hidden_states",
        "plain_peak_mib": plain / 2**20,
        "peak_mib": peak / 2**20,
        "seconds": seconds,
        "rounds": rounds,
        "rounds_that_differed": wrong,
    }


def stress(model: nn.Module, ids: torch.Tensor, want: dict[str, torch.Tensor], rounds: int) -> int:
    """Steps whose gradients differ while a second stream allocates, copies and frees."""
    side = torch.cuda.Stream()
    host = torch.empty(2**24, pin_memory=True)
    wrong = 0
    for index in range(rounds):
        with torch.cuda.stream(side):
            for _ in range(8):
                noise = host.to("cuda", non_blocking=True).mul_(index + 1.0)
                host.copy_(noise, non_blocking=True)
                del noise
        got = step(model, ids)
        wrong += any(not torch.equal(got[name], value) for name, value in want.items())
    torch.cuda.synchronize()
    return wrong


def main() -> None:
    """Measure every mode and write the records."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--tokens", type=int, default=4096)
    options = parser.parse_args()
    rows = []
    for mode in MODES:
        rows.append(measure(mode, options.rounds, options.layers, options.width, options.tokens))
        print(json.dumps(rows[-1]), flush=True)
        torch.cuda.empty_cache()
    shape = {name: getattr(options, name) for name in ("layers", "width", "tokens")}
    record = {"device": torch.cuda.get_device_name(0), "versions": versions(), "shape": shape}
    options.out.write_text(json.dumps({**record, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
