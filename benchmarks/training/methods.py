"""What is compared. Each takes the dense network and has the same epochs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

import secateur as sc
from benchmarks.training.loop import Fit

Method = Callable[[nn.Module, float, Fit], sc.Masks]
INTERVAL = 25  # steps between changes of the masks


def one_shot(criterion: sc.Criterion) -> Method:
    """Prune at once, then train what is left."""

    def run(model: nn.Module, sparsity: float, fit: Fit) -> sc.Masks:
        masks = sc.prune_(model, criterion, sparsity, allocation=sc.global_).masks
        fit.train(model, lambda optimizer: masks.hold(model, optimizer))
        return masks

    return run


def gradual(model: nn.Module, sparsity: float, fit: Fit) -> sc.Masks:
    """Cubic over the first 60 % of the steps."""
    steps = fit.steps(fit.net.epochs)
    rise = sc.cubic(0, sparsity, begin=0, end=round(0.6 * steps))
    method = sc.Gradual(model, sc.Magnitude(), rise, when=sc.every(INTERVAL), allocation=sc.global_)
    fit.train(model, method.attach)
    return method.masks


def imp(model: nn.Module, sparsity: float, fit: Fit) -> sc.Masks:
    """Three rounds of a third of the epochs each, the learning rate rewound in each."""

    def retrain(model: nn.Module, hold: Callable[..., Any], number: int) -> None:
        fit.train(model, hold, fit.net.epochs / 3)

    rounds = sc.prune_in_rounds_(
        model, sc.Magnitude(), sc.geometric(sparsity, 3), retrain, allocation=sc.global_
    )
    return rounds.masks


def rigl(model: nn.Module, sparsity: float, fit: Fit) -> sc.Masks:
    """Sparse from the first step, from the largest weights of each layer."""
    method = sc.Dynamic(
        model,
        sc.RigL(),
        sparsity,
        end=round(0.75 * fit.steps(fit.net.epochs)),
        when=sc.every(INTERVAL),
        start=sc.Magnitude(),
    )
    fit.train(model, method.attach)
    return method.masks


def acdc(model: nn.Module, sparsity: float, fit: Fit) -> sc.Masks:
    """Turns of a twelfth of the training until half of it, dense for a sixth, then sparse for a third."""
    steps = fit.steps(fit.net.epochs)
    plan = sc.phases(
        begin=0, period=max(1, steps // 12), dense_from=steps // 2, sparse_from=round(2 / 3 * steps)
    )
    method = sc.ACDC(model, sc.Magnitude(), sparsity, plan)
    fit.train(model, method.attach)
    return method.masks


def l1(model: nn.Module, sparsity: float, fit: Fit) -> sc.Masks:
    """Half of the epochs under a proximal L1 penalty, then pruned; half to train what is left."""
    half = fit.net.epochs / 2
    fit.train(model, sc.Regularize(model, sc.L1(2e-4)).attach, half)
    masks = sc.prune_(model, sc.Magnitude(), sparsity, allocation=sc.global_).masks
    fit.train(model, lambda optimizer: masks.hold(model, optimizer), half)
    return masks


def dense(model: nn.Module, sparsity: float, fit: Fit) -> sc.Masks:
    """Nothing removed: what the epochs do by themselves."""
    fit.train(model)
    return sc.Masks.of(model)


METHODS: dict[str, Method] = {
    "dense": dense,
    "random, one shot": one_shot(sc.Random()),
    "magnitude, one shot": one_shot(sc.Magnitude()),
    "gradual magnitude": gradual,
    "rounds, learning rate rewound": imp,
    "RigL": rigl,
    "AC/DC": acdc,
    "L1, then magnitude": l1,
}
