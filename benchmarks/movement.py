"""MiniLM trained end to end on Banking77 while it is pruned: magnitude, movement, with a teacher or not.

    python -m benchmarks.movement [--sparsities 0.5 0.85 0.9 0.95 0.97] [--methods ...] [--seeds 0] [--dev]

All start from the pretrained encoder and a new linear head, and train all weights but the embeddings for
the same epochs with AdamW, in batches of questions of about one length; the linear layers of the encoder
are pruned along one cubic schedule. The teacher is the network that the same epochs give without pruning.
Accuracy on the test questions once, at the end. `--dev` measures on every tenth training question, left out
of the training, instead: settings are chosen there (`--rate`). A finished cell is kept in
`results/movement.jsonl` and not run again; the table is `results/movement.md`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_model, save_model
from torch import Tensor, nn

import secateur as sc
from benchmarks import realdata
from benchmarks.realdata.evaluate import evaluating
from benchmarks.realdata.sentences import PAD, sentence_ids
from secateur.core.files import replacing

RESULTS, CACHE = Path(__file__).parent / "results", Path(__file__).parent / "cache"
FILE, TABLE = RESULTS / "movement.jsonl", RESULTS / "movement.md"
EPOCHS, BATCH, RATE = 10, 16, 1e-4
KEY = ("part", "method", "sparsity", "teacher", "seed", "epochs", "rate")
ENCODER = sc.Where(include="encoder.encoder.*")


class Classifier(nn.Module):
    """Mean of the last hidden states, normalised and scaled, and a linear head: [B, L] ids -> [B, 77]."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = realdata.minilm()
        self.encoder.embeddings.requires_grad_(False)
        self.head = nn.Linear(384, 77)

    def forward(self, ids_BL: Tensor) -> Tensor:
        mask_BL = ids_BL != PAD
        hidden = self.encoder(input_ids=ids_BL, attention_mask=mask_BL.long()).last_hidden_state
        mean = (hidden * mask_BL[..., None]).sum(1) / mask_BL.sum(1, keepdim=True)
        logits: Tensor = self.head(F.normalize(mean, dim=-1) * 20)
        return logits


class Remembered(nn.Module):
    """A teacher that is asked once for each question: without dropout, it says the same in every epoch."""

    def __init__(self, teacher: nn.Module) -> None:
        super().__init__()
        self.teacher = teacher
        self._said: dict[tuple[int, ...], Tensor] = {}

    def forward(self, ids_BL: Tensor) -> Tensor:
        questions = [tuple(row[row != PAD].tolist()) for row in ids_BL]
        new = [i for i, question in enumerate(questions) if question not in self._said]
        if new:
            self._said.update(zip((questions[i] for i in new), self.teacher(ids_BL[new]), strict=True))
        return torch.stack([self._said[question] for question in questions])


@cache
def data(part: str) -> tuple[list[Tensor], Tensor]:
    """Token ids of each question and labels: `train` without `dev`, `dev`, or `test`."""
    texts, labels = realdata.banking77("test" if part == "test" else "train")
    chosen = torch.ones(len(texts), dtype=torch.bool)
    if part != "test":
        tenth = torch.arange(len(texts)) % 10 == 0
        chosen = tenth if part == "dev" else ~tenth
    which = chosen.nonzero().flatten().tolist()
    return [sentence_ids(texts[i]) for i in which], labels[chosen]


def padded(rows: list[Tensor]) -> Tensor:
    """One batch."""
    return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=PAD)


def gradual(model: nn.Module, rise: sc.Schedule) -> sc.Method:
    """Magnitude, ranked over all layers."""
    return sc.Gradual(model, sc.Magnitude(), rise, when=sc.every(20), allocation=sc.global_, where=ENCODER)


def hard(model: nn.Module, rise: sc.Schedule) -> sc.Method:
    """The same share of each matrix, by learned scores."""
    return sc.Movement(model, rise, where=ENCODER)


def soft(model: nn.Module, rise: sc.Schedule) -> sc.Method:
    """A threshold on the scores of all layers that follows the schedule, with a penalty."""
    return sc.Movement(model, rise, soft=sc.Soft(), where=ENCODER)


def fixed(model: nn.Module, rise: sc.Schedule) -> sc.Method:
    """The same with the paper's threshold; ranked at the end."""
    return sc.Movement(model, rise, soft=sc.Soft(threshold=0.1), where=ENCODER)


def random(model: nn.Module, rise: sc.Schedule) -> sc.Method:
    """Any weights."""
    return sc.Gradual(model, sc.Random(), rise, when=sc.every(20), where=ENCODER)


METHODS: dict[str, Callable[[nn.Module, sc.Schedule], sc.Method]] = {
    "random": random,
    "magnitude": gradual,
    "hard movement": hard,
    "soft movement": soft,
    "soft movement, fixed threshold": fixed,
}


def train(
    model: Classifier,
    seed: int,
    rate: float,
    method: sc.Method | None = None,
    teacher: nn.Module | None = None,
) -> None:
    """The same steps for all: warm-up of a twentieth, then linear to zero."""
    rows, labels = data("train")
    steps = total_steps()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.01, fused=True)
    warm = steps // 20
    plan = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: min((s + 1) / warm, (steps - s) / (steps - warm))
    )
    generator = torch.Generator().manual_seed(seed)
    order: list[Tensor] = []
    model.train()
    torch.manual_seed(seed)  # dropout
    pruning = method.attach(optimizer, steps=steps) if method else nullcontext()
    taught = sc.Distill(model, teacher, weight=0.9) if teacher is not None else None
    with pruning, taught or nullcontext():
        for _ in range(steps):
            order = order or epoch(rows, generator)
            part = order.pop()
            output = model(padded([rows[i] for i in part.tolist()]))
            loss = F.cross_entropy(output, labels[part])
            optimizer.zero_grad()
            (taught(loss, output) if taught is not None else loss).backward()
            optimizer.step()
            plan.step()
    model.eval()


def epoch(rows: list[Tensor], generator: torch.Generator) -> list[Tensor]:
    """Batches in random order, each of questions of similar length; a new division every time."""
    lengths = torch.tensor([len(row) for row in rows])
    near = lengths + 4 * torch.rand(len(rows), generator=generator)
    batches = near.argsort()[: len(rows) // BATCH * BATCH].view(-1, BATCH)
    return list(batches[torch.randperm(len(batches), generator=generator)])


def total_steps() -> int:
    """Optimizer steps of a run."""
    return EPOCHS * (len(data("train")[0]) // BATCH)


def accuracy(model: nn.Module, part: str) -> float:
    """The fraction of questions whose intent has the largest logit."""
    rows, labels = data(part)
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    right = 0
    with evaluating(model):
        for start in range(0, len(order), 64):
            piece = order[start : start + 64]
            guess = model(padded([rows[i] for i in piece])).argmax(1)
            right += int((guess == labels[piece]).sum())
    return right / len(rows)


@cache
def dense(seed: int, rate: float) -> Classifier:
    """The network without pruning, which teaches the others; kept in `benchmarks/cache`."""
    torch.manual_seed(seed)
    model = Classifier()
    path = CACHE / f"banking77-{EPOCHS}-{rate}-{seed}.safetensors"
    if path.is_file():
        load_model(model, path)
        return model.eval()
    train(model, seed, rate)
    CACHE.mkdir(exist_ok=True)
    with replacing(path) as temporary:
        save_model(model, str(temporary))
    return model


@cache
def teacher(seed: int, rate: float) -> Remembered:
    """What it said is kept from one cell to the next."""
    return Remembered(dense(seed, rate))


def run(method: str, sparsity: float, taught: bool, seed: int, part: str, rate: float) -> dict[str, Any]:
    """One cell."""
    started = time.perf_counter()
    if method == "dense":
        return {"accuracy": accuracy(dense(seed, rate), part), "removed": 0.0, "seconds": 0.0}
    torch.manual_seed(seed)
    model = Classifier()
    steps = total_steps()
    rise = sc.cubic(0, sparsity, begin=steps // 10, end=round(0.7 * steps))
    pruning = METHODS[method](model, rise)
    train(model, seed, rate, pruning, teacher(seed, rate) if taught else None)
    pruning.masks.check(model)
    return {
        "accuracy": accuracy(model, part),
        "removed": pruning.masks.sparsity,
        "seconds": round(time.perf_counter() - started, 1),
        "notes": list(pruning.report().notes[1:]),
    }


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sparsities", nargs="*", type=float, default=[0.5, 0.85, 0.9, 0.95, 0.97])
    parser.add_argument("--methods", nargs="*", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--teacher", nargs="*", default=["without", "with"], choices=["without", "with"])
    parser.add_argument("--seeds", nargs="*", type=int, default=[0])
    parser.add_argument("--dev", action="store_true")
    parser.add_argument("--rate", type=float, help="another learning rate; with --dev only")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.rate and not arguments.dev:
        parser.error("--rate needs --dev: rates are not chosen on test questions")
    part, rate = "dev" if arguments.dev else "test", arguments.rate or RATE
    done = {tuple(r[k] for k in KEY) for r in rows_of()}
    for seed in arguments.seeds:
        cells = [("dense", 0.0, "without")]
        cells += [
            (m, s, t) for s in arguments.sparsities for m in arguments.methods for t in arguments.teacher
        ]
        for method, sparsity, teacher in cells:
            cell = dict(zip(KEY, (part, method, sparsity, teacher, seed, EPOCHS, rate), strict=True))
            if tuple(cell.values()) in done or (method == "random" and teacher == "with"):
                continue
            found = run(method, sparsity, teacher == "with", seed, part, rate)
            machine = f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"
            row = cell | found | {"machine": machine, "torch": torch.__version__}
            with FILE.open("a", encoding="utf-8") as f:
                f.write(json.dumps(row) + "\n")
            print(row, flush=True)
    write_table()


def rows_of() -> list[dict[str, Any]]:
    """All finished cells."""
    return [json.loads(line) for line in FILE.read_text().splitlines()] if FILE.exists() else []


def write_table() -> None:
    """Test accuracy as Markdown."""
    found = [r for r in rows_of() if r["part"] == "test"]
    if not found:
        return
    sparsities = sorted({r["sparsity"] for r in found} - {0.0})
    full = statistics.fmean(r["accuracy"] for r in found if r["method"] == "dense")
    lines = [
        "# MiniLM on Banking77, pruned while it is trained",
        "",
        "Written by `python -m benchmarks.movement`.",
    ]
    lines += [f"Test accuracy in per cent after {EPOCHS} epochs; without pruning {100 * full:.2f}.", ""]
    lines += ["| method | " + " | ".join(f"{s:.0%}" for s in sparsities) + " |"]
    lines += ["| --- |" + " ---: |" * len(sparsities)]
    for method in METHODS:
        for teacher in ("without", "with"):
            mine = [r for r in found if r["method"] == method and r["teacher"] == teacher]
            if mine:
                cells = [[100 * r["accuracy"] for r in mine if r["sparsity"] == s] for s in sparsities]
                texts = [f"{statistics.fmean(c):.2f}" if c else "—" for c in cells]
                name = method + (", with the dense one as teacher" if teacher == "with" else "")
                lines.append(f"| {name} | " + " | ".join(texts) + " |")
    TABLE.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
