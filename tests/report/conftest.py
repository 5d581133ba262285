"""A report like a real one, for the tests of the page and of the browser."""

import numpy as np
import pytest

from secateur.report import Section, Table, percent, render, size
from secateur.report.figures import (
    Histogram,
    Series,
    curves,
    grouped_bars,
    heat,
    histograms,
    layer_bars,
)

HOSTILE = "</text><script>alert('1')</script> & \"id='x'\" url(#a)"
SPARSITIES = [0.0, 0.5, 0.8, 0.9, 0.95, 0.98, 0.99]
PARTS = ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")


def layer_names(count):
    return [f"model.layers.{i // len(PARTS)}.{PARTS[i % len(PARTS)]}" for i in range(count)]


def accuracy_curves(count, points=SPARSITIES):
    x = np.asarray(points)
    lines = [0.97 - 0.6 * x ** (40 / (1 + i)) for i in range(count)]
    return [Series(f"criterion {i}", x, y, y - 0.02 * x, y + 0.02 * x) for i, y in enumerate(lines)]


def weight_histograms(count, bins):
    rng = np.random.default_rng(0)
    panels = []
    for name in layer_names(count):
        weights = rng.laplace(0, 0.02, 2000)
        counts, edges = np.histogram(weights, bins, (-0.15, 0.15), density=True)
        x = np.linspace(-0.15, 0.15, 2 * bins + 1)
        fits = [
            Series("Laplace fit", x, np.exp(-abs(x) / 0.02) / 0.04),
            Series("Gaussian fit", x, np.exp(-((x / 0.028) ** 2) / 2) / 0.07),
        ]
        panels.append(Histogram(name, edges, counts, fits, np.where(abs(edges[:-1]) < 0.03, 0, counts)))
    return panels


def layer_table(count):
    rng = np.random.default_rng(1)
    columns = [
        "layer",
        "shape",
        "weights",
        "kept",
        "sparsity asked",
        "sparsity",
        "error",
        "error before repair",
    ]
    rows = [
        [name, "4096 × 11008", 4096 * 11008, 9_017_754, 0.8, 0.8, *map(float, rng.random(2) / 10)]
        for name in layer_names(count)
    ]
    return Table(columns, rows, f"All {count} layers.")


def build_page(layers, criteria, panels, bins=40, points=SPARSITIES):
    rng = np.random.default_rng(2)
    names = [HOSTILE, *layer_names(layers - 1)]
    columns = [percent(s) for s in SPARSITIES]
    sections = [
        Section(
            "Accuracy against sparsity",
            "What it shows.\n\nAnd what it does not.",
            [
                curves(
                    accuracy_curves(criteria, points),
                    "sparsity",
                    "accuracy",
                    reference=("dense", 0.97),
                    xformat=percent,
                    yformat=percent,
                    log_density=True,
                    caption="Accuracy after fine-tuning.",
                )
            ],
            [
                Table(
                    ["criterion", *columns], [["magnitude", *rng.random(7).tolist()], ["random", *[None] * 7]]
                )
            ],
            ["One seed diverged.", HOSTILE],
        ),
        Section(
            "Layers",
            figures=[
                layer_bars(
                    names,
                    rng.random(layers),
                    xlabel="sparsity",
                    reference=("asked", 0.8),
                    format=percent,
                    caption="Sparsity of each layer.",
                ),
                heat(
                    names,
                    columns,
                    rng.random((layers, 7)),
                    xlabel="sparsity",
                    title="accuracy",
                    caption="Accuracy when one layer is pruned.",
                ),
            ],
            tables=[layer_table(layers)],
        ),
        Section(
            "Weights", figures=[histograms(weight_histograms(panels, bins), caption="Weights of each layer.")]
        ),
        Section(
            "Size",
            figures=[
                grouped_bars(
                    ["file", "memory"],
                    {"dense": [4.9e6, 5.4e6], "pruned": [1.3e6, 5.4e6]},
                    "size",
                    format=size,
                    caption="Bytes before and after.",
                )
            ],
        ),
    ]
    facts = [("sparsity", "80%"), ("weights kept", "245,862"), (HOSTILE, HOSTILE), ("file", "1.31 MB")]
    return render(
        f"Digits {HOSTILE}", "Keeps 97% with one weight in five.", facts, sections, "secateur · seed 0"
    )


@pytest.fixture(scope="session")
def page():
    return build_page(layers=20, criteria=6, panels=12)
