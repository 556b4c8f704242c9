"""The two training loops: one block against its original output, and the whole model end to end."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from quantlab.errors import MethodError
from quantlab.texts import calibration_autocast
from quantlab.training.linears import FakeLinear, StepLinear, product_dtype
from quantlab.training.workshop import Workshop

WARM_UP = 0.05
"""Share of the steps over which the learning rate rises."""
FLOOR = 0.05
"""Share of the learning rate that is left at the end of the cosine."""
HEAD_TOKENS = 256
"""Positions whose logits are in memory at one time."""


@dataclass(frozen=True)
class Rates:
    """Learning rates, each as a fraction of the mean size of what is learned in one linear (its
    mean step for weights and steps; zero-points in codes; norms and biases of their mean size).

    AdamW moves an entry by about its rate at every step, so that fractions of a step mean the same
    for every model, layer and bit width.
    """

    weights: float
    steps: float
    zeros: float
    others: float


def parameter_groups(module: nn.Module, rates: Rates) -> list[dict[str, Any]]:
    """AdamW's groups for every linear under training of `module`, and for its other vectors (norms,
    biases). Marks what is learned with `requires_grad`; everything else is frozen."""
    for parameter in module.parameters():
        parameter.requires_grad_(False)
    groups: list[dict[str, Any]] = []

    def learn(parameter: nn.Parameter, rate: float) -> None:
        if rate > 0:
            parameter.requires_grad_(True)
            groups.append({"params": [parameter], "lr": rate})

    inside: set[int] = set()
    for layer in module.modules():
        if isinstance(layer, (FakeLinear, StepLinear)):
            step = float(layer.scale.detach().mean())
            learn(layer.scale, rates.steps * step)
            if isinstance(layer, FakeLinear):
                learn(layer.weight, rates.weights * step)
                learn(layer.zero, rates.zeros)
            inside.update(id(p) for p in (layer.scale, getattr(layer, "weight", None)))
    for parameter in module.parameters():
        if parameter.dim() == 1 and id(parameter) not in inside:
            size = float(parameter.detach().abs().mean())
            learn(parameter, rates.others * max(size, 1e-3))
    return groups


def optimizer_of(groups: list[dict[str, Any]]) -> torch.optim.AdamW:
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    for group in optimizer.param_groups:
        group["peak"] = group["lr"]
    return optimizer


def set_rate(optimizer: torch.optim.Optimizer, step: int, total: int) -> None:
    """Linear warm-up, then a cosine down to `FLOOR`; `step` from 0."""
    rising = min(1.0, (step + 1) / max(1.0, WARM_UP * total))
    cosine = 0.5 * (1 + math.cos(math.pi * step / max(total, 1)))
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * rising * (FLOOR + (1 - FLOOR) * cosine)


def batch_order(count: int, epochs: int, seed: int) -> list[int]:
    """Batches in the order they are taken: every epoch shuffled anew, the same for a seed."""
    generator = torch.Generator().manual_seed(seed)
    return [
        int(index) for _ in range(epochs) for index in torch.randperm(count, generator=generator)
    ]


def settle(module: nn.Module) -> None:
    for layer in module.modules():
        if isinstance(layer, (FakeLinear, StepLinear)):
            layer.settle()


@torch.enable_grad()
def train_block(
    module: nn.Module,
    forward: Callable[[Tensor], Tensor],
    inputs: Sequence[Tensor],
    targets: Sequence[Tensor],
    rates: Rates,
    epochs: int,
    seed: int,
    report: Callable[[int], None],
    *,
    by_token: bool = True,
) -> list[float]:
    """Train all of a block's parameters to give `targets` for `inputs`; the loss of every step.

    forward: runs the block (as `BlockRunner.run`) on a batch [pieces, length, width]. The loss is
    the squared difference as a fraction of the target's square: `by_token` of each token's and then
    the mean, since a few tokens with massive activations would outweigh all others, and the next
    norm divides each token by its size; otherwise of the mean square of all targets (a plain mean
    squared error). Raises: MethodError when it is not finite.
    """
    optimizer = optimizer_of(parameter_groups(module, rates))
    order = batch_order(len(inputs), epochs, seed)
    sizes = [target.square().mean(-1) for target in targets]
    if not by_token:
        mean = sum(float(size.mean()) for size in sizes) / len(sizes)
        sizes = [torch.full_like(size, mean) for size in sizes]
    losses: list[float] = []
    for step, index in enumerate(order):
        report(step)
        set_rate(optimizer, step, len(order))
        wrong = (forward(inputs[index]).float() - targets[index]).square().mean(-1)
        loss = (wrong / sizes[index].clamp_min(1e-12)).mean()
        losses.append(finite(loss))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        settle(module)
    return losses


def finite(loss: Tensor) -> float:
    value = float(loss.detach())
    if not math.isfinite(value):
        raise diverged()
    return value


def diverged() -> MethodError:
    return MethodError(
        "training diverged: the loss is not a finite number", "lower the learning rates"
    )


@torch.no_grad()
def last_states(module: Any, batches: Sequence[Tensor]) -> list[Tensor]:
    """The model's last hidden states for each batch of tokens: what its logits are made from."""
    with calibration_autocast():
        return [module.base_model(ids, use_cache=False).last_hidden_state for ids in batches]


@torch.no_grad()
def head_loss(
    module: Any, states: Tensor, ids: Tensor, original: Tensor | None, weight: Tensor
) -> tuple[float, Tensor]:
    """(mean loss in nats a position, its gradient by `states`), logits made chunk by chunk.

    states, original: [pieces, length, width]; ids int64 [pieces, length]. With `original` (the
    unquantized model's last states) KL(original || this) at every position; without, the negative
    log-likelihood of the next token. Both have the gradient p - target by the logits, which is
    formed in place: the logits are the largest tensors of a training step. weight: `head_weight`.
    """
    pieces, length, width = states.shape
    if original is None:
        rows, labels = states[:, :-1].reshape(-1, width), ids[:, 1:].reshape(-1)
    else:
        rows, labels = states.reshape(-1, width), original.reshape(-1, width)
    gradient = torch.empty(rows.shape, dtype=torch.float32)
    total = 0.0
    for start in range(0, len(rows), HEAD_TOKENS):
        chunk, wanted = rows[start : start + HEAD_TOKENS], labels[start : start + HEAD_TOKENS]
        logits, slope = scores(module, chunk, weight)
        log_p = logits.log_softmax(-1)
        if original is None:
            total -= float(log_p.gather(1, wanted[:, None]).sum())
            error = log_p.exp_()
            error[torch.arange(len(wanted)), wanted] -= 1
        else:
            log_target = scores(module, wanted, weight)[0].log_softmax(-1)
            target = log_target.exp()
            total += float(torch.dot(target.view(-1), log_target.sub_(log_p).view(-1)))
            error = log_p.exp_().sub_(target)
        if slope is not None:
            error *= slope
        gradient[start : start + HEAD_TOKENS] = (error.to(weight.dtype) @ weight).float()
    if not math.isfinite(total):
        raise diverged()
    gradient /= len(rows)
    if original is None:
        gradient = functional.pad(gradient.view(pieces, -1, width), (0, 0, 0, 1))
    return total / len(rows), gradient.view(pieces, length, width)


def head_weight(module: Any) -> Tensor:
    """The head's weight [vocabulary, width] in the dtype of products: converted once, not for every
    chunk of logits."""
    weight: Tensor = module.get_output_embeddings().weight.detach()
    with calibration_autocast():
        return weight.to(product_dtype(weight))


def scores(module: Any, states: Tensor, weight: Tensor) -> tuple[Tensor, Tensor | float | None]:
    """(float32 logits as the model's own forward makes them, their slope by the head's product;
    None for 1). weight: `head_weight`."""
    bias = module.get_output_embeddings().bias
    logits = functional.linear(states.to(weight.dtype), weight).float()
    if bias is not None:
        logits = logits + bias
    scale = getattr(module.config, "logit_scale", None)
    cap = getattr(module.config, "final_logit_softcapping", None)
    if scale is not None:
        logits = logits * scale
    if cap is None:
        return logits, scale
    bounded = torch.tanh(logits / cap)
    return bounded * cap, (1 - bounded.square()) * (1.0 if scale is None else scale)


@torch.enable_grad()
def train_model(
    module: Any,
    layers: Sequence[nn.Module],
    batches: Sequence[Tensor],
    original: Sequence[Tensor] | None,
    rates: Rates,
    epochs: int,
    workshop: Workshop,
    phase: str,
    save_every: int,
) -> None:
    """Train the parameters of `layers` (the blocks) end to end, by `head_loss` on `batches`.

    A checkpoint (parameters and AdamW's moments) is kept every `save_every` steps, and an earlier
    one gone on from. The losses are kept as `workshop.curves[phase]`. Raises: MethodError.
    """
    for parameter in module.parameters():
        parameter.requires_grad_(False)
    groups = [group for layer in layers for group in parameter_groups(layer, rates)]
    optimizer = optimizer_of(groups)
    learned = [group["params"][0] for group in groups]
    order = batch_order(len(batches), epochs, workshop.seed)
    losses = restore_steps(workshop, phase, learned, optimizer)
    weight = head_weight(module)
    for step in range(len(losses), len(order)):
        workshop.report(phase, step, len(order))
        index = order[step]
        set_rate(optimizer, step, len(order))
        with calibration_autocast():
            states = module.base_model(batches[index], use_cache=False).last_hidden_state
        teacher = None if original is None else original[index]
        loss, gradient = head_loss(module, states, batches[index], teacher, weight)
        losses.append(loss)
        optimizer.zero_grad(set_to_none=True)
        states.backward(gradient)
        optimizer.step()
        for layer in layers:
            settle(layer)
        if (step + 1) % save_every == 0 or step + 1 == len(order):
            keep_steps(workshop, phase, learned, optimizer, losses)
    workshop.report(phase, len(order), len(order))
    workshop.curves[phase] = [losses]


def keep_steps(
    workshop: Workshop,
    phase: str,
    learned: Sequence[Tensor],
    optimizer: torch.optim.Optimizer,
    losses: list[float],
) -> None:
    tensors = {f"{i}.value": tensor for i, tensor in enumerate(learned)}
    for i, name, tensor in moments(learned, optimizer):
        tensors[f"{i}.{name}"] = tensor
    workshop.save(phase, tensors, {"losses": losses})


def moments(
    learned: Sequence[Tensor], optimizer: torch.optim.Optimizer
) -> Iterator[tuple[int, str, Tensor]]:
    for i, tensor in enumerate(learned):
        for name, value in optimizer.state[tensor].items():
            yield i, name, value


@torch.no_grad()
def restore_steps(
    workshop: Workshop,
    phase: str,
    learned: Sequence[Tensor],
    optimizer: torch.optim.Optimizer,
) -> list[float]:
    """The losses of the steps already made, their results put in place; empty where none were."""
    kept = workshop.load(phase)
    if kept is None:
        return []
    tensors, state = kept
    for i, tensor in enumerate(learned):
        tensor.copy_(tensors.pop(f"{i}.value"))
    for name, value in tensors.items():
        index, key = name.split(".")
        optimizer.state[learned[int(index)]][key] = value
    return [float(loss) for loss in state["losses"]]
