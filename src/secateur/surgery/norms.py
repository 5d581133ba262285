"""Root-mean-square norms take up the change of the mean."""

from __future__ import annotations

import math
from collections.abc import Mapping

from secateur.graph import Graph, Group
from secateur.graph.plan import Sizes
from secateur.surgery.cuts import Attribute


def rescaled_norms(
    graph: Graph, cut: Mapping[Group, tuple[int, ...]]
) -> tuple[dict[str, tuple[float, float]], list[Attribute], list[str]]:
    """Factors for norms' weights, new values of their epsilons, and notes; see `graph.rms`."""
    size = Sizes({g.axis: len(k) for g, k in cut.items()})
    scales: dict[str, tuple[float, float]] = {}
    epsilons: list[Attribute] = []
    notes: list[str] = []
    for module, form in graph.norms.items():
        owner = graph.model.get_submodule(module)
        stored = graph.types.stored.get(id(owner._parameters[form.weight]))
        if stored is None:  # the model was cut since
            continue
        name = stored.name  # several norms may share one weight
        (dim,) = stored.type.dims
        ratio = math.prod(a.size for a in dim) / size(dim)
        if ratio == 1:
            continue
        scales[name] = (math.sqrt(ratio), form.offset)
        if form.value is None:
            notes.append(f"{module} takes epsilon from the dtype, which cannot be rescaled.")
        else:
            epsilons.append(Attribute(module, (), form.epsilon, None, form.value, form.value * ratio))
    return scales, epsilons, notes
