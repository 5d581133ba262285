"""Pruning while a model trains: methods that live on its optimizer, whatever the loop around it.

- `attach.py`: the hooks that every method shares; what counts as a step.
- `live.py`: masks that change during training, and what they write into weights and gradients.
- `optimizer_state.py`: what an optimizer remembers of weights that leave or come back.
- `method.py`: masks, step and history of a model in training, and all of it as a state to go on from.
- `shadow.py`: dense weights behind those that the model runs on, and parameters of methods.
- `movement.py`, `gates.py`, `reparametrize.py`: scores, gates and thresholds that are learned.
- `regularize.py`: penalties that train weights and units to zero.
- `choice.py`: masks by score.
- `gradual.py`, `dynamic.py`, `alternate.py`: the methods.
"""

from secateur.training.alternate import ACDC, Phases, phases
from secateur.training.dynamic import SET, Dynamic, RigL
from secateur.training.gates import L0
from secateur.training.gradual import Gradual
from secateur.training.method import CollapseWarning
from secateur.training.movement import Movement, Soft
from secateur.training.regularize import L1, L2, GroupLasso, Growing, Regularize, batch_norm_scales
from secateur.training.reparametrize import STR

__all__ = [
    "ACDC",
    "L0",
    "L1",
    "L2",
    "SET",
    "STR",
    "CollapseWarning",
    "Dynamic",
    "Gradual",
    "GroupLasso",
    "Growing",
    "Movement",
    "Phases",
    "Regularize",
    "RigL",
    "Soft",
    "batch_norm_scales",
    "phases",
]
