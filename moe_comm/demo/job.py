"""What every process of the demo has to agree on: the job, the model, its data."""

from __future__ import annotations

import argparse
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

NUM_EXPERTS, TOPK, HIDDEN = 16, 4, 128
SEQS_PER_RANK, SEQ_LEN, VOCAB = 2, 96, 256
LEARNING_RATE = 3e-3
INIT_STD = 0.06  # large enough that the experts matter from the first step on


@dataclass(frozen=True)
class Job:
    """What every process has to know. `store` is the file by which the ranks find each other."""

    ranks: int
    ranks_per_node: int
    steps: int
    layers: int
    layout: str
    store: str


def build_model(layers: int) -> Any:
    """A small Qwen3-MoE with random weights, the same on every call."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    return Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            vocab_size=VOCAB,
            hidden_size=HIDDEN,
            intermediate_size=2 * HIDDEN,
            moe_intermediate_size=HIDDEN,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=32,
            num_experts=NUM_EXPERTS,
            num_experts_per_tok=TOPK,
            max_position_embeddings=SEQ_LEN,
            tie_word_embeddings=False,
            initializer_range=INIT_STD,
        )
    )


def build_optimizer(model: Any) -> torch.optim.Optimizer:
    # Not foreach: the ranks' experts are DTensors and the rest is not; torch's fused loops take no mixture.
    return torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, foreach=False)


def loss_and_logits(
    model: Any, tokens: torch.Tensor, num_targets: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross entropy of the next byte, divided by the targets of *all* ranks: losses and gradients then add up."""
    logits = model(tokens[:, :-1], use_cache=False).logits
    loss = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum"
    )
    return loss / num_targets, logits


def load_text() -> tuple[str, torch.Tensor]:
    """Python's own documentation, as bytes; where a distribution leaves that out, a long module's source."""
    try:
        from pydoc_data import topics

        return "pydoc_data.topics", _as_bytes("\n".join(topics.topics.values()))
    except ImportError:
        return "argparse.py", _as_bytes(Path(argparse.__file__).read_text())


def _as_bytes(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8).long()


def quieten() -> None:
    """Small work on shared cores: one thread each, no downloads, no chatter."""
    torch.set_num_threads(1)
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["TRANSFORMERS_VERBOSITY"] = "error"
