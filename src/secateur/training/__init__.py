"""Pruning while a model trains: methods that live on its optimizer, whatever the loop around it.

- `attach.py`: the hooks that every method shares; what counts as a step.
- `live.py`: masks that change during training, and what they write into weights and gradients.
- `optimizer_state.py`: what an optimizer remembers of weights that leave or come back.
- `method.py`: masks, step and history of a model in training, and all of it as a state to go on from.
- `shadow.py`: dense weights behind those that the model runs on, and parameters of methods.
- `movement.py`, `gates.py`, `reparametrize.py`: scores, gates and thresholds that are learned.
- `rounds.py`: prune, retrain, prune.
- `distill.py`: learning from the dense model.
- `regularize.py`: penalties that train weights and units to zero.
- `choice.py`: masks by score.
- `gradual.py`, `dynamic.py`, `alternate.py`: the methods.
"""

from secateur.training.alternate import ACDC, Phases, phases
from secateur.training.distill import Distill
from secateur.training.dynamic import SET, Dynamic, RigL
from secateur.training.gates import L0
from secateur.training.gradual import Gradual
from secateur.training.growing import Growing
from secateur.training.method import CollapseWarning, Method
from secateur.training.movement import Movement, Soft
from secateur.training.regularize import L1, L2, GroupLasso, Regularize, batch_norm_scales
from secateur.training.reparametrize import STR
from secateur.training.rounds import Round, Rounds, fine_tuning, geometric, lr_rewinding, prune_in_rounds_
from secateur.training.unit_movement import UnitMovement

__all__ = [
    "ACDC",
    "L0",
    "L1",
    "L2",
    "SET",
    "STR",
    "CollapseWarning",
    "Distill",
    "Dynamic",
    "Gradual",
    "GroupLasso",
    "Growing",
    "Method",
    "Movement",
    "Phases",
    "Regularize",
    "RigL",
    "Round",
    "Rounds",
    "Soft",
    "UnitMovement",
    "batch_norm_scales",
    "fine_tuning",
    "geometric",
    "lr_rewinding",
    "phases",
    "prune_in_rounds_",
]
