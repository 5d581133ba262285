"""Which weights of a layer go, and what the others become."""

from secateur.solvers.alps import ALPS
from secateur.solvers.base import Solved, Solver
from secateur.solvers.obs import OBS
from secateur.solvers.quadratic import Quadratic
from secateur.solvers.repair import fit
from secateur.solvers.select import Select
from secateur.solvers.sparsegpt import SparseGPT

__all__ = ["ALPS", "OBS", "Quadratic", "Select", "Solved", "Solver", "SparseGPT", "fit"]
