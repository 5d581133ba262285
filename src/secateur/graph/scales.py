"""Attention whose scale is not given: by default it is one over the root of the size of a head.

Cutting that size would change the scale that the model was trained with. Where the module that calls can keep
the number, and its source can be made to ask for it, the trained scale stays; else the cut is not exact.
"""

from __future__ import annotations

from types import CodeType

from torch import Tensor

from secateur.callsites import CallSite, Edit, Reason, locate
from secateur.graph import axes
from secateur.graph.axes import Dim
from secateur.graph.types import DefaultScale, Types, calling

_WHY = "the default scale of attention depends on its size"


class DefaultScales:
    """Calls of attention without a scale, seen during one trace."""

    def __init__(self, types: Types) -> None:
        self.types = types
        self._sites: dict[tuple[CodeType, int], CallSite | Reason] = {}
        self._seen: dict[tuple[str, Edit], float] = {}

    def of(self, query: Tensor) -> float:
        """The scale that attention with this query has by default; what cutting it does is noted."""
        dim = self.types.dims(query)[-1]
        scale = float(axes.extent(dim)) ** -0.5
        found = self._call(dim, scale)
        if found is None:
            self.types.changes(dim, _WHY)
        elif self._seen.setdefault((found.module, found.edit), scale) == scale:
            self.types.scales.append(found)
        else:  # a module keeps one number for each call, and this call runs with several
            same = [s for s in self.types.scales if (s.module, s.edit) == (found.module, found.edit)]
            for call in (*same, found):
                self.types.changes(call.dim, _WHY)
            self.types.scales = [s for s in self.types.scales if s not in same]
        return scale

    def _call(self, dim: Dim, scale: float) -> DefaultScale | None:
        """The present call, if a module can keep its scale."""
        frame = calling()
        if frame is None:
            return None
        key = frame.f_code, frame.f_lasti
        module = self.types.names.get(id(frame.f_locals.get(next(iter(frame.f_code.co_varnames), ""))))
        if module is None:
            return None
        if key not in self._sites:
            self._sites[key] = locate(*key)
        site = self._sites[key]
        return DefaultScale(dim, module, scale, site.scale()) if isinstance(site, CallSite) else None
