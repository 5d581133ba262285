"""What to do with a pruned language model: fine-tune it with the zeros held, or with LoRA under the masks.

    pip install 'secateur[peft]' && python examples/sparse_finetune.py MODEL_DIR TEXTS.json [STEPS]

TEXTS.json is a list of strings, the last fifty of which are held out. About a minute for 260,000 weights.
"""

import copy
import json
import math
import sys

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

import secateur as sc

torch.set_num_threads(1)  # the matrices are small
SPARSITY, BATCH, LENGTH = 0.7, 8, 128

folder, file, steps = (*sys.argv[1:], "120")[:3]
STEPS = int(steps)
dense = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
tokenizer = AutoTokenizer.from_pretrained(folder)
with open(file, encoding="utf-8") as f:
    texts = json.load(f)


def windows(part: list[str]) -> torch.Tensor:
    """Token ids of the texts, one after the other, in windows of equal length."""
    ids = torch.cat([tokenizer(text, return_tensors="pt")["input_ids"][0] for text in part])
    return ids[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH)


train, held_out = windows(texts[:-50]), windows(texts[-50:])
calibration = [{"input_ids": batch} for batch in train[:128].split(32)]


def perplexity(model: nn.Module) -> float:
    model.eval()
    with torch.no_grad():
        losses = [model(input_ids=ids, labels=ids).loss.item() for ids in held_out.split(64)[:-1]]
    return math.exp(sum(losses) / len(losses))


def fit(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    model.train()
    generator = torch.Generator().manual_seed(0)  # the same batches for all
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, optimizer.defaults["lr"], STEPS)
    for _ in range(STEPS):
        ids = train[torch.randint(len(train), (BATCH,), generator=generator)]
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        schedule.step()
    model.eval()


def show(what: str, model: nn.Module) -> None:
    print(f"{what:<34}{perplexity(model):8.3f}", flush=True)


def with_lora() -> nn.Module:
    torch.manual_seed(0)
    return get_peft_model(copy.deepcopy(pruned), LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"))


def adamw(model: nn.Module, rate: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate, weight_decay=0.0)


pruned = copy.deepcopy(dense)
masks = sc.prune_(pruned, sc.SparseGPT(), SPARSITY, batches=calibration).masks
show("dense", dense)
show(f"{SPARSITY:.0%} removed, not tuned", pruned)

tuned = copy.deepcopy(pruned)
optimizer = adamw(tuned, 6e-3)
with masks.hold(tuned, optimizer):
    fit(tuned, optimizer)
show("all weights, masks held", tuned)

model = with_lora()
with sc.hold_lora(model, masks):
    fit(model, adamw(model, 1e-2))
    show("LoRA held under the masks", model)
    merged = sc.merge_lora_(model, masks)
show("  merged", merged.model)
masks.check(merged.model)

model = with_lora()
fit(model, adamw(model, 1e-2))
show("LoRA without a hold", model)
merged = sc.merge_lora_(model, masks)
show("  merged", merged.model)
print(merged)

sc.save(tuned, "tuned", masks=masks, source=folder)
