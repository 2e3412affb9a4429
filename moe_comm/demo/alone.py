"""The same training in one process, and the comparison with what the ranks computed."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from typing import Any

import torch

from .job import (
    NUM_EXPERTS,
    SEQ_LEN,
    SEQS_PER_RANK,
    TOPK,
    Job,
    build_model,
    build_optimizer,
    loss_and_logits,
)
from .ranks import DemoError

TIE = 1e-5  # relative distance of two experts' scores below which rounding may decide between them


def _kind(name: str) -> str:
    kinds = {
        ".experts.": "experts",
        ".gate.": "routers",
        "self_attn.": "attention",
        "norm": "norms",
    }
    return next((kind for part, kind in kinds.items() if part in name), "embedding, head")


@dataclass
class Routes:
    """Where the tokens of all ranks went, summed over layers and steps. Counted from the routers' choices."""

    pairs: int = 0  # (token, expert)
    pairs_away: int = 0  # of these, the expert lives on another node
    token_nodes_away: int = 0  # (token, other node), however many experts it has there

    def add(self, topk_idx: torch.Tensor, job: Job) -> None:
        ranks_of_experts = topk_idx // -(-NUM_EXPERTS // job.ranks)
        node = ranks_of_experts // job.ranks_per_node
        source_rank = torch.arange(len(topk_idx)) // (len(topk_idx) // job.ranks)
        away = node != (source_rank // job.ranks_per_node)[:, None]
        self.pairs += topk_idx.numel()
        self.pairs_away += int(away.sum())
        nodes = torch.zeros(len(topk_idx), job.ranks // job.ranks_per_node, dtype=torch.bool)
        self.token_nodes_away += int(nodes.scatter(1, node, True).sum() - (~away).any(1).sum())


@dataclass
class Step:
    """One step, both ways. Errors are the largest difference over the largest value of the single process."""

    loss: float
    loss_ranks: float
    logits_error: float
    kinds: dict[
        str, tuple[float, float]
    ]  # kind of parameter: its largest gradient, its largest difference

    @property
    def gradient_error(self) -> float:
        return max(difference for _, difference in self.kinds.values()) / max(
            g for g, _ in self.kinds.values()
        )

    @property
    def worst(self) -> float:
        return max(
            abs(self.loss - self.loss_ranks) / abs(self.loss),
            self.logits_error,
            self.gradient_error,
        )


class Alone:
    """The same training in this process: the whole batch, all experts, no communication."""

    def __init__(self, job: Job, text: torch.Tensor):
        self._job, self._text, self._random = job, text, random.Random(0)
        self._model = build_model(job.layers)
        self._optimizer = build_optimizer(self._model)
        self._routers: list[
            tuple[torch.Tensor, torch.Tensor]
        ] = []  # (scores, chosen experts) of the last forward
        self.routes = Routes()
        self.num_parameters = sum(p.numel() for p in self._model.parameters())
        for name, module in self._model.named_modules():
            if name.endswith(".mlp.gate"):
                module.register_forward_hook(
                    lambda _, args, out: self._routers.append((out[0].detach(), out[2]))
                )

    def next_batch(self) -> torch.Tensor:
        """[sequences of all ranks, SEQ_LEN + 1], and its forward pass; see the module's docstring for ties."""
        while True:
            starts = [
                self._random.randrange(len(self._text) - SEQ_LEN - 1)
                for _ in range(self._num_sequences)
            ]
            tokens = torch.stack([self._text[start : start + SEQ_LEN + 1] for start in starts])
            self._routers.clear()
            self._loss, self._logits = loss_and_logits(self._model, tokens, tokens[:, 1:].numel())
            if not any(_tied(scores) for scores, _ in self._routers):
                for _, topk_idx in self._routers:
                    self.routes.add(topk_idx, self._job)
                return tokens

    @property
    def _num_sequences(self) -> int:
        return self._job.ranks * SEQS_PER_RANK

    def backward(self) -> None:
        """Of the batch of `next_batch`."""
        self._optimizer.zero_grad()
        self._loss.backward()

    def compare_and_step(self, from_ranks: list[tuple[float, Any, Any]]) -> Step:
        """This process's loss, logits and gradients against the ranks'; then a step with the ranks' gradients."""
        losses, logits, gradients = zip(*from_ranks, strict=True)
        theirs = {name: torch.from_numpy(array) for name, array in gradients[0].items()}
        parameters = dict(self._model.named_parameters())
        ours = {name: p.grad for name, p in parameters.items() if p.grad is not None}
        if ours.keys() != theirs.keys():
            raise DemoError(f"gradients on one side only: {sorted(ours.keys() ^ theirs.keys())}")
        kinds: dict[str, tuple[float, float]] = {}
        for name, grad in ours.items():
            gradient, difference = kinds.get(_kind(name), (0.0, 0.0))
            kinds[_kind(name)] = (
                max(gradient, float(grad.abs().max())),
                max(difference, _difference(theirs[name], grad)),
            )
        all_logits = torch.cat([torch.from_numpy(part) for part in logits])
        logits_error = _difference(all_logits, self._logits) / float(
            self._logits.detach().abs().max()
        )
        for name, grad in theirs.items():
            parameters[name].grad = grad
        self._optimizer.step()
        return Step(self._loss.item(), sum(losses), logits_error, kinds)


def _difference(theirs: torch.Tensor, ours: torch.Tensor) -> float:
    """The largest one; infinite if anything is not a number."""
    largest = float((theirs - ours.detach()).abs().max())
    return largest if math.isfinite(largest) else math.inf


def _tied(scores: torch.Tensor) -> bool:
    """Whether some token's last chosen and first refused expert score the same up to rounding."""
    best = scores.topk(TOPK + 1).values
    return bool((best[:, -2] - best[:, -1] <= TIE * scores.abs().amax(dim=1)).any())
