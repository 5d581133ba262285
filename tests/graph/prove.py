"""One proof for any model: traced, permuted, cut group by group and all together, compared, undone."""

import copy
import math

import torch
from torch import nn

from secateur.core.modes import evaluation
from secateur.graph import Graph, axes, oracle
from secateur.graph.trace import results, stored_tensors
from secateur.surgery import Surgery

TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-5}


def redrawn(model, seed=0):
    """Random parameters and statistics everywhere, so that no zero bias or small scale hides an error."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            fan = max(1, p.numel() // max(1, p.shape[0])) if p.dim() > 1 else 4
            p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64) / math.sqrt(fan))
        for name, b in model.named_buffers():
            if name.endswith("running_mean"):
                b.copy_(torch.randn(b.shape, generator=generator))
            if name.endswith("running_var"):
                b.copy_(torch.rand(b.shape, generator=generator) + 0.5)
    return model


def state_of(model):
    """All that an undone surgery must have put back: the very tensors, and the plain attributes."""
    kept = {
        id(t) for t in (*model.parameters(), *model.buffers())
    }  # other tensors are made by the forward pass
    tensors = {n: (id(t), t.detach().clone()) for n, t in stored_tensors(model).items() if id(t) in kept}
    plain = {
        n: (type(m), {k: v for k, v in vars(m).items() if _is_plain(v)}) for n, m in model.named_modules()
    }
    return tensors, copy.deepcopy(plain)


def assert_same_state(a, b):
    assert a[0].keys() == b[0].keys()
    for name, (key, value) in a[0].items():
        assert b[0][name][0] == key, f"{name} is another tensor"
        assert torch.equal(b[0][name][1], value) or value.is_meta, f"{name} differs"
    assert a[1].keys() == b[1].keys()
    for name, (kind, values) in a[1].items():
        assert b[1][name][0] is kind
        assert values == b[1][name][1], name


def _is_plain(value):
    if isinstance(value, tuple | list):
        return all(_is_plain(v) for v in value)
    return value is None or isinstance(value, int | float | str)


def units(graph):
    """Groups that are cut together: clusters, and each other group alone."""
    clusters = graph.clusters()
    inside = {g for c in clusters for g in c}
    return [*clusters, *((g,) for g in graph.groups() if g not in inside)]


def chosen(cluster, seed=0, share=0.5):
    """Random units to keep of the groups of one cluster, in equal shares; {} if none can be removed."""
    generator = torch.Generator().manual_seed(seed)
    shares = math.gcd(*(g.size for g in cluster))
    step = max(-(-g.step * shares // g.size) for g in cluster)
    least = max(-(-g.least * shares // g.size) for g in cluster)
    removed = min(int(shares * share), shares - least) // step * step
    kept = {}
    for group in cluster if removed > 0 else ():
        n = group.size // shares * (shares - removed)
        kept[group] = torch.randperm(group.size, generator=generator)[:n].sort().values.tolist()
    return kept


def tensors(x):
    return [t for t in results(x) if t.is_floating_point()]


def run(model, args, kwargs):
    with evaluation(model), torch.no_grad():
        return [t.detach() for t in tensors(model(*copy.deepcopy(args), **copy.deepcopy(kwargs)))]


def cut_and_compare(graph, kept, plain, *, power=True, tolerance=None, backward=True):
    """Apply, compare with the masked twin where that is exact, run backward, undo."""
    args, kwargs = graph.example
    model = copy.deepcopy(graph.model)
    before = state_of(model)
    applied = Surgery(kept).apply_(model)
    names = ", ".join(str(g) for g in kept)
    try:
        found = run(model, args, kwargs)
        cost = graph.cost({g: len(k) for g, k in kept.items()})
        assert sum(p.numel() for p in model.parameters()) == cost.params, names
        if backward and any(p.requires_grad for p in model.parameters()):
            with evaluation(model):
                loss = sum(t.double().square().sum() for t in tensors(model(*args, **kwargs)))
            if loss.requires_grad:
                loss.backward()
            model.zero_grad(set_to_none=True)
        if all(g.exact for g in kept):
            twin = run(graph.masked_twin(kept), args, kwargs)
            limit = tolerance or TOLERANCE.get(plain[0].dtype, 2e-2)
            error = oracle.difference(twin, found)
            assert error <= limit, f"cutting {names}: error {error:.1e}"
            if power:
                assert oracle.difference(plain, found) > 100 * limit, f"cutting {names} changes nothing"
    finally:
        applied.undo()
    assert_same_state(before, state_of(model))
    assert oracle.difference(plain, run(model, args, kwargs)) == 0.0
    return [t.shape for t in found]


def prove(
    model,
    *args,
    redraw=True,
    power=True,
    tolerance=None,
    permute=True,
    backward=True,
    dtype=torch.float64,
    **kwargs,
):
    """Trace, permute, cut every group alone, all exact ones, and all; the graph for more assertions."""
    if dtype is not None:
        model.to(dtype)
    if redraw:
        redrawn(model)
    model.eval()
    graph = Graph.trace(model, *args, **kwargs)
    plain = run(graph.model, args, kwargs)
    assert all(bool(t.isfinite().all()) for t in plain), "the test model gives infinities"
    settings = {"power": power, "tolerance": tolerance, "backward": backward}
    if permute and graph.groups():
        check = graph.verify()
        assert check.error <= (tolerance or TOLERANCE.get(plain[0].dtype, 2e-2)), f"permuted: {check}"
    whole, exact = {}, {}
    for i, cluster in enumerate(units(graph)):
        kept = chosen(cluster, seed=i)
        if not kept:
            continue
        cut_and_compare(graph, kept, plain, **settings)
        whole |= kept
        if all(g.exact for g in kept):
            exact |= kept
    for together in (exact, whole):
        if len(together) > 1:
            cut_and_compare(graph, together, plain, **(settings | {"power": False}))
    return graph


def kinds(graph):
    return sorted(g.kind for g in graph.groups())


def holding(graph, tensor, dim=None):
    """Groups that can be cut and live in a dimension of a tensor."""
    return [g for g in graph.groups() if any(m.tensor == tensor and dim in (None, m.dim) for m in g.members)]


def reasons(graph, tensor, dim):
    """Why leaves of a dimension are frozen; None for those that are not."""
    return [leaf.frozen for leaf in axes.leaves(graph.dims(tensor)[dim])]


def sizes(graph, tensor, dim):
    """Sizes of the groups that can be cut in a dimension."""
    return sorted(g.size for g in holding(graph, tensor, dim))


class Module(nn.Module):
    """A module from parts and a function `forward(self, *inputs)`, for tests of one line."""

    def __init__(self, function, **parts):
        super().__init__()
        for name, part in parts.items():
            if isinstance(part, nn.Parameter | nn.Module) or not isinstance(part, torch.Tensor):
                setattr(self, name, part)
            else:
                self.register_buffer(name, part)
        self.function = function

    def forward(self, *args, **kwargs):
        return self.function(self, *args, **kwargs)
