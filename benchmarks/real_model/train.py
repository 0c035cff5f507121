"""The training loop, and the losses of learning and of five ways of unlearning.

The forward and backward pass are in bfloat16, the optimizer works on float32 copies of the weights.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from evaluate import answer_logp
from torch import Tensor
from torch.nn.functional import logsigmoid, mse_loss

from sage_hub.rows.encoding import Batch, Encoded, batches

Step: TypeAlias = Callable[[Any, "Batches"], Tensor]  # (model, batches of a step) -> loss

NPO_BETA = 0.1
SIMNPO_BETA = 2.5
RMU_COEFFICIENT = 10.0  # length of the steering vector, in lengths of a mean hidden state


@dataclass(frozen=True)
class Batches:
    """What one step sees: rows to forget and rows to keep, with their places in their sets."""

    forget: Batch
    retain: Batch | None


class Optimizer:
    """AdamW on float32 copies of the parameters of a bfloat16 model."""

    def __init__(self, parameters: Sequence[Tensor], rate: float) -> None:
        self.parameters = list(parameters)
        self.copies = [p.detach().float().clone().requires_grad_() for p in self.parameters]
        self.adam = torch.optim.AdamW(self.copies, lr=rate, weight_decay=0.0, fused=True)
        self.rate = rate

    def step(self, share: float = 1.0) -> None:
        """One step at `share` of the rate; the gradients are clipped to norm 1 and cleared."""
        for copy, parameter in zip(self.copies, self.parameters, strict=True):
            copy.grad = parameter.grad.float() if parameter.grad is not None else None
            parameter.grad = None
        torch.nn.utils.clip_grad_norm_(self.copies, 1.0)
        self.adam.param_groups[0]["lr"] = share * self.rate
        self.adam.step()
        with torch.no_grad():
            for copy, parameter in zip(self.copies, self.parameters, strict=True):
                copy.grad = None
                parameter.copy_(copy)


def learn(
    model: Any, rows: Sequence[Encoded], *, epochs: int, batch: int, rate: float, seed: int
) -> Iterator[float]:
    """Fine-tune on the answers of `rows`; yields the mean probability seen in each epoch.

    The rate rises for a tenth of the steps, then falls to 0.
    """
    rng = random.Random(seed)
    optimizer = Optimizer([p for p in model.parameters() if p.requires_grad], rate)
    total = epochs * -(-len(rows) // batch)
    rise, step = max(1, total // 10), 0
    for _ in range(epochs):
        seen: list[float] = []
        for one in shuffled(rows, batch, rng):
            logp, count = answer_logp(model, one)
            (-logp.sum() / count.sum()).backward()
            optimizer.step(min((step + 1) / rise, (total - step) / (total - rise + 1)))
            seen += (logp.detach() / count).exp().tolist()
            step += 1
        yield sum(seen) / len(seen)


def fisher(model: Any, rows: Sequence[Encoded]) -> dict[str, Tensor]:
    """Diagonal Fisher information of each parameter: its mean squared gradient, row by row.

    Of the mean negative log-likelihood per answer token, in nats, in float32.
    """
    squares = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in _trained(model)}
    for place in range(len(rows)):
        _loss(model, _batch(rows, [place])).backward()
        for name, parameter in _trained(model):
            if parameter.grad is not None:
                squares[name].add_(parameter.grad.float().square(), alpha=1 / len(rows))
                parameter.grad = None
    return squares


def _trained(model: Any) -> list[tuple[str, Tensor]]:
    return [(name, p) for name, p in model.named_parameters() if p.requires_grad]


def shuffled(rows: Sequence[Encoded], size: int, rng: random.Random) -> list[Batch]:
    """All rows once in random batches, of like length where that costs little randomness."""
    order = list(range(len(rows)))
    rng.shuffle(order)
    found = []
    for first in range(0, len(order), 4 * size):
        places = sorted(order[first : first + 4 * size], key=lambda place: len(rows[place].ids))
        for start in range(0, len(places), size):
            found.append(_batch(rows, places[start : start + size]))
    rng.shuffle(found)
    return found


def _batch(rows: Sequence[Encoded], places: Sequence[int]) -> Batch:
    """The rows at `places` as one batch that knows their places in `rows`."""
    (one,) = batches([rows[place] for place in places], len(places))
    return Batch(one.ids, one.mask, one.answer, tuple(places[line] for line in one.rows))


def endless(rows: Sequence[Encoded], size: int, rng: random.Random) -> Iterator[Batch]:
    """Batches without end; every row comes up before any comes up again."""
    while True:
        yield from shuffled(rows, size, rng)


def ascend(model: Any, step: Batches) -> Tensor:
    """Gradient ascent: the loss on the forget rows, turned round."""
    return -_loss(model, step.forget)


def grad_diff(model: Any, step: Batches) -> Tensor:
    """GradDiff (Maini et al. 2024, arXiv 2401.06121): ascent, and descent on the retain rows."""
    assert step.retain is not None
    return _loss(model, step.retain) - _loss(model, step.forget)


def npo(reference: Tensor) -> Step:
    """NPO (Zhang et al. 2024, arXiv 2404.05868): −(2/β) log σ(−β log(π/π_ref)), mean over rows.

    `reference` (forget rows,) is log π_ref, by the base.
    """

    def loss(model: Any, step: Batches) -> Tensor:
        logp, _ = answer_logp(model, step.forget)
        ratio = logp - reference[list(step.forget.rows)].to(logp)
        return -2 / NPO_BETA * logsigmoid(-NPO_BETA * ratio).mean()

    return loss


def simnpo(model: Any, step: Batches) -> Tensor:
    """SimNPO (Fan et al. 2024, arXiv 2410.07163): no reference, the mean over tokens, γ = 0.

    Without the retain loss that its authors add: with it there was little to repair, as its
    gradient fades where the answers are forgotten and the retain loss then mends what was lost.
    """
    logp, count = answer_logp(model, step.forget)
    return -2 / SIMNPO_BETA * logsigmoid(-SIMNPO_BETA * logp / count).mean()


@dataclass(frozen=True)
class Rmu:
    """RMU (Li et al. 2024, arXiv 2403.03218): hidden states behind a layer are steered to noise.

    On the forget rows to a random vector, on the retain rows to what they are in the base, which
    `frozen` is. Three down projections up to that layer are trained.
    """

    frozen: Any
    layer: int
    target: Tensor  # (hidden,)
    weight: float = 1.0  # of the retain rows

    @classmethod
    def of(cls, frozen: Any, rows: Sequence[Encoded], seed: int) -> Rmu:
        """Steers behind a fifth of the layers."""
        layer = max(2, len(frozen.model.layers) // 5)
        generator = torch.Generator().manual_seed(seed)
        direction = torch.rand(frozen.config.hidden_size, generator=generator)
        with torch.no_grad():
            hidden = _hidden(frozen, layer, _batch(rows, range(min(8, len(rows)))))
        # The first token's state is a sink many times longer than the others; the median is theirs.
        length = hidden.float().norm(dim=-1).median()
        target = RMU_COEFFICIENT * length * direction.to(length) / direction.norm()
        return cls(frozen, layer, target)

    def parameters(self, model: Any) -> list[Tensor]:
        """What is trained."""
        layers = model.model.layers[self.layer - 2 : self.layer + 1]
        return [layer.mlp.down_proj.weight for layer in layers]

    def __call__(self, model: Any, step: Batches) -> Tensor:
        assert step.retain is not None
        forget = _hidden(model, self.layer, step.forget)[step.forget.mask.bool()]
        keep = step.retain.mask.bool()
        retain = _hidden(model, self.layer, step.retain)[keep]
        with torch.no_grad():
            before = _hidden(self.frozen, self.layer, step.retain)[keep]
        steered = mse_loss(forget.float(), self.target.expand_as(forget))
        return steered + self.weight * mse_loss(retain.float(), before.float())


class _ReachedError(Exception):
    pass


def _hidden(model: Any, layer: int, batch: Batch) -> Tensor:
    """The hidden states (rows, tokens, features) behind `layer`; what follows it is not run."""
    found: list[Tensor] = []

    def stop(module: Any, args: Any, output: Any) -> None:
        found.append(output[0] if isinstance(output, tuple) else output)
        raise _ReachedError

    hook = model.model.layers[layer].register_forward_hook(stop)
    try:
        model.model(batch.ids.to(model.device), use_cache=False)
    except _ReachedError:
        pass
    finally:
        hook.remove()
    return found[0]


def _loss(model: Any, batch: Batch) -> Tensor:
    """Mean negative log-likelihood per answer token, in nats."""
    logp, count = answer_logp(model, batch)
    return -logp.sum() / count.sum()
