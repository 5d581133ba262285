"""The algebra of dimensions, against programs on real tensors whose entries say where they come from."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from secateur.graph import axes
from secateur.graph.axes import Axis
from secateur.graph.plan import Sizes, keep_mask

SIZES = st.sampled_from([1, 2, 3, 4, 6, 8, 12])


def blame(what):
    return f"{what} here"


class Tracked:
    """A real tensor of labels beside its dimensions."""

    def __init__(self, value, dims):
        self.value, self.dims = value, dims
        assert [axes.extent(d) for d in dims] == list(value.shape)


def factors(n, draw):
    """`n` as a product in a random way."""
    out = []
    while n > 1 and draw(st.booleans()):
        f = draw(st.sampled_from([k for k in range(2, n + 1) if n % k == 0]))
        out.append(f)
        n //= f
    return [*out, n]


def view(x, draw):
    sizes = [f for n in x.value.shape for f in factors(n, draw)]
    if draw(st.booleans()):  # and join neighbours
        i = draw(st.integers(0, len(sizes) - 1))
        sizes[i : i + 2] = [int(torch.tensor(sizes[i : i + 2]).prod())]
    return Tracked(x.value.reshape(sizes), axes.regroup(x.dims, sizes, blame))


def permute(x, draw):
    order = draw(st.permutations(range(x.value.dim())))
    return Tracked(x.value.permute(order), [x.dims[i] for i in order])


def halves(x, draw):
    """Cut in two, put together again in either order."""
    i = draw(st.integers(0, x.value.dim() - 1))
    n = x.value.shape[i]
    at = draw(st.integers(0, n))
    a, b = axes.cut(x.dims[i], at, blame)
    u, v = x.value.split([at, n - at], i)
    if draw(st.booleans()):
        a, b, u, v = b, a, v, u
    dims = [*x.dims]
    dims[i] = axes.concat([a, b])
    return Tracked(torch.cat([u, v], i), dims)


def doubled(x, draw):
    i = draw(st.integers(0, x.value.dim() - 1))
    dims = [*x.dims]
    dims[i] = axes.concat([x.dims[i], x.dims[i]])
    return Tracked(torch.cat([x.value, x.value], i), dims)


def stacked(x, draw):
    i = draw(st.integers(0, x.value.dim()))
    dims = [*x.dims]
    dims.insert(i, axes.fresh(2, "a stack"))
    return Tracked(torch.stack([x.value, x.value], i), dims)


def sliced(x, draw):
    i = draw(st.integers(0, x.value.dim() - 1))
    n = x.value.shape[i]
    low = draw(st.integers(0, n - 1))
    high = draw(st.integers(low + 1, n))
    dims = [*x.dims]
    dims[i] = axes.cut(axes.cut(dims[i], low, blame)[1], high - low, blame)[0]
    return Tracked(x.value.narrow(i, low, high - low), dims)


def flattened(x, draw):
    return Tracked(x.value.flatten(), axes.regroup(x.dims, [x.value.numel()], blame))


STEPS = (view, view, permute, permute, halves, doubled, stacked, sliced, flattened)


@given(st.data())
@settings(max_examples=150)
def test_kept_positions_are_those_of_real_tensors(data):
    shape = data.draw(st.lists(SIZES, min_size=1, max_size=3))
    dims = [axes.fresh(n) for n in shape]
    source = torch.arange(int(torch.tensor(shape).prod())).view(shape)
    x = Tracked(source, dims)
    for step in data.draw(st.lists(st.sampled_from(STEPS), max_size=6)):
        if x.value.numel() > 300 or x.value.dim() > 6:
            break
        x = step(x, data.draw)
    free = [leaf for d in (*dims, *x.dims) for leaf in axes.leaves(d) if leaf.frozen is None]
    masks = {}
    for leaf in dict.fromkeys(free):
        mask = torch.tensor(data.draw(st.lists(st.booleans(), min_size=leaf.size, max_size=leaf.size)))
        mask[0] = True
        masks[leaf] = mask
    gone = torch.ones(source.shape, dtype=torch.bool)
    for i, d in enumerate(dims):
        keep = keep_mask(d, masks, {})
        assert int(keep.sum()) == Sizes({a: int(m.sum()) for a, m in masks.items()})(d)
        gone &= keep.view([-1 if j == i else 1 for j in range(len(dims))])
    survive = torch.ones(x.value.shape, dtype=torch.bool)
    for i, d in enumerate(x.dims):
        survive &= keep_mask(d, masks, {}).view([-1 if j == i else 1 for j in range(len(x.dims))])
    # What survives of the result is what comes from the kept entries of the source.
    assert torch.equal(survive, gone.flatten()[x.value])


def dimension(draw, n, depth=2):
    """A dimension of size n, of a random make."""
    if n == 1:
        return ()
    kinds = ["leaf", "frozen"] + (["product", "sum"] if depth else [])
    kind = draw(st.sampled_from(kinds))
    if kind == "product":
        f = draw(st.sampled_from([k for k in range(2, n + 1) if n % k == 0]))
        return (*dimension(draw, f, depth - 1), *dimension(draw, n // f, depth - 1))
    if kind == "sum":
        at = draw(st.integers(1, n - 1))
        return axes.concat([dimension(draw, at, depth - 1), dimension(draw, n - at, depth - 1)])
    return axes.fresh(n, "from the start" if kind == "frozen" else None)


def shape_of(dim):
    """The structure, with leaves by number in order of appearance; frozen ones are all alike."""
    known = {}

    def of(d):
        out = []
        for a in axes.atoms(d):
            if a.terms is not None:
                out.append(tuple(of(t) for t in axes.terms_of(a)))
            else:
                out.append((a.size, "frozen" if a.frozen else known.setdefault(a, len(known))))
        return tuple(out)

    return of(dim)


@given(st.data())
@settings(max_examples=150)
def test_unified_dimensions_are_the_same_or_frozen(data):
    n = data.draw(SIZES)
    a, b = dimension(data.draw, n), dimension(data.draw, n)
    axes.unify(a, b, blame)
    for _ in range(2):
        if axes.frozen_reason(a) is None or axes.frozen_reason(b) is None:
            masks = {}
            for leaf in axes.leaves((*a, *b)):
                if leaf.frozen is None:
                    mask = torch.rand(leaf.size) < 0.5
                    masks[leaf] = mask
            assert torch.equal(keep_mask(a, masks, {}), keep_mask(b, masks, {}))
        before = shape_of(a), shape_of(b)
        axes.unify(b, a, blame)  # the second time, and the other way round, nothing is left to say
        if axes.frozen_reason(a) is None:
            assert (shape_of(a), shape_of(b)) == before


@given(st.data())
@settings(max_examples=60)
def test_freezing_reaches_everything(data):
    d = dimension(data.draw, data.draw(SIZES), 3)
    axes.freeze(d, "a reason")
    assert all(leaf.frozen for leaf in axes.leaves(d))
    assert axes.frozen_reason(d) is not None
    assert not axes.freeze(d, "another")
    later = axes.regroup([d], factors(axes.extent(d), data.draw), blame)
    assert all(leaf.frozen for part in later for leaf in axes.leaves(part))  # what it is refined into too


def test_odd_sizes_freeze_only_the_middle():
    n, c, h, w = (Axis(k) for k in (2, 8, 5, 7))
    out = axes.regroup([(n,), (h,), (w,), (c,)], [2, 7, 5, 8], blame)
    assert (n.frozen, c.frozen) == (None, None) and h.frozen and w.frozen
    assert axes.same(out[0], (n,)) and axes.same(out[3], (c,)) and "5 x 7 as 7 x 5" in h.frozen


def test_sums_divide_part_by_part():
    q, k, v = (Axis(12) for _ in range(3))
    whole = axes.concat([(q,), (k,), (v,)])
    three, h, d = axes.regroup([whole], [3, 4, 3], blame)
    assert axes.frozen_reason(three) and h[0].frozen is None
    assert axes.same((q,), (*h, *d)) and axes.same((k,), (v,))


def test_a_cut_inside_a_product_freezes():
    a, b = Axis(4), Axis(3)
    assert axes.cut((a, b), 6, blame)[0] and a.frozen is None
    axes.cut((a, b), 7, blame)
    assert "cut at 7 inside a product" in (axes.frozen_reason((a, b)) or "")


def test_a_product_is_found_on_either_side():
    for swap in (False, True):
        whole, outer, inner = Axis(12), Axis(4), Axis(3)
        a, b = ((whole,), (outer, inner)) if not swap else ((outer, inner), (whole,))
        assert axes.unify(a, b, blame)
        assert axes.same((whole,), (outer, inner)) and not outer.frozen and not inner.frozen
