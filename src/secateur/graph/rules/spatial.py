"""Pooling, resampling, shuffling of pixels and channels, windows, Fourier transforms."""

from __future__ import annotations

from secateur.graph import axes
from secateur.graph.rules.base import Call, positive, rule, words
from secateur.graph.types import Types, blame, everywhere

_POOLS = words(
    """max_pool1d max_pool2d max_pool2d_with_indices max_pool3d max_pool3d_with_indices avg_pool1d
    avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d _adaptive_avg_pool2d
    adaptive_avg_pool3d _adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d
    mkldnn_max_pool2d upsample_nearest1d upsample_nearest2d upsample_nearest3d _upsample_nearest_exact1d
    _upsample_nearest_exact2d _upsample_nearest_exact3d upsample_linear1d upsample_bilinear2d
    upsample_bicubic2d upsample_trilinear3d _upsample_bilinear2d_aa _upsample_bicubic2d_aa
    fractional_max_pool2d max_unpool2d"""
)


@rule(*_POOLS)
def _(types: Types, call: Call) -> None:
    source = call.tensors[0]
    rank = next(n for n in (1, 2, 3) if f"{n}d" in call.name)
    dims = types.dims(source)
    keep = len(dims) - rank
    for d in dims[keep:]:
        types.freeze(d, "pooled or resampled over")
    for out in call.outs:
        spatial = [axes.fresh(n, "a pool's output extent") for n in out.shape[keep:]]
        types.put(out, [*dims[:keep], *spatial], live=types.of(source).live)


@rule("grid_sampler_2d", "grid_sampler_3d", "grid_sampler")
def _(types: Types, call: Call) -> None:
    source, grid = call["input"], call["grid"]
    dims = types.dims(source)
    for d in [*dims[2:], *types.dims(grid)[1:]]:
        types.freeze(d, "sampled over")
    types.unify(dims[0], types.dims(grid)[0])
    spatial = [axes.fresh(n, "a sample's extent") for n in call.out.shape[2:]]
    types.put(call.out, [*dims[:2], *spatial], live=types.of(source).live)


@rule("pixel_shuffle", "pixel_unshuffle")
def _(types: Types, call: Call) -> None:
    source, out = call["self"], call.out
    dims, at = types.dims(source), source.dim() - 3
    if call.name.endswith("unshuffle"):
        r = call["downscale_factor"]
        for d in dims[at + 1 :]:
            types.freeze(d, "pixels become channels")
        channels = (
            *dims[at],
            *axes.fresh(r, "pixels become channels"),
            *axes.fresh(r, "pixels become channels"),
        )
    else:
        r = call["upscale_factor"]
        channels = axes.fresh(out.shape[at])
        pixels = (
            *axes.fresh(r, blame("channels become pixels")),
            *axes.fresh(r, blame("channels become pixels")),
        )
        types.unify(dims[at], (*channels, *pixels))
    spatial = [axes.fresh(n, "pixels") for n in out.shape[at + 1 :]]
    types.put(out, [*dims[:at], channels, *spatial], live=types.of(source).live)


@rule("channel_shuffle", "native_channel_shuffle")
def _(types: Types, call: Call) -> None:
    source, groups = call["self"], call["groups"]
    dims = list(types.dims(source))
    outer, inner = axes.split_product(dims[1], groups, blame)
    dims[1] = (*inner, *outer)
    types.like(call.out, dims, source)


@rule("im2col")
def _(types: Types, call: Call) -> None:
    source, kernel = call["self"], call["kernel_size"]
    dims = types.dims(source)
    for d in dims[-2:]:
        types.freeze(d, "cut into windows")
    taps = axes.fresh(kernel[0] * kernel[1], "a window's extent")
    channels = (*dims[-3], *taps)
    types.put(
        call.out,
        [*dims[:-3], channels, axes.fresh(call.out.shape[-1], "windows")],
        live=types.of(source).live,
    )


@rule("col2im")
def _(types: Types, call: Call) -> None:
    source, kernel = call["self"], call["kernel_size"]
    dims, out = types.dims(source), call.out
    channels = axes.fresh(out.shape[-3])
    types.unify(dims[-2], (*channels, *axes.fresh(kernel[0] * kernel[1], "a window's extent")))
    types.freeze(dims[-1], "windows are put together")
    spatial = [axes.fresh(n, "windows") for n in out.shape[-2:]]
    types.put(out, [*dims[:-2], channels, *spatial], live=types.of(source).live)


@rule("_fft_r2c", "_fft_c2c", "_fft_c2r")
def _(types: Types, call: Call) -> None:
    source, dims = call["self"], list(types.dims(call["self"]))
    for i in call["dim"]:
        at = positive(i, len(dims))
        types.freeze(dims[at], "a Fourier transform runs over it")
        dims[at] = axes.fresh(call.out.shape[at], "frequencies")
    types.put(call.out, dims, live=types.of(source).live)


@rule("cumsum", "cumsum_")
def _(types: Types, call: Call) -> None:
    source, dims = call["self"], types.dims(call["self"])
    if dims:
        at = dims[positive(call["dim"], len(dims))]
        if call.out.is_floating_point():  # of counts it says where something starts, and follows their order
            types.freeze(at, "a running sum over it")
        types.note(at, "running sum")
        types.summed(at, types.of(source).live)
        # The sum so far is not zero at a removed position, but nothing was added there.
        types.put(call.out, dims, live=types.of(source).live | everywhere([at]))
    else:
        types.like(call.out, dims, source, value=False)


@rule("cumprod", "cumprod_", "logcumsumexp", "cummax", "cummin", "_cummax_helper")
def _(types: Types, call: Call) -> None:
    dims = types.dims(call["self"])
    types.freeze(dims[positive(call["dim"], len(dims))], "a running product or maximum over it")
    for out in call.outs:
        types.put(out, dims, live=types.of(call["self"]).live)
