"""Gradual pruning of a Hugging Face model inside `Trainer`, with distillation, saved for `from_pretrained`.

    pip install 'secateur[hf]' accelerate && python examples/train_huggingface.py MODEL_DIR TEXTS.json [STEPS]

TEXTS.json is a list of strings, the last fifty of which are held out. Half a minute for 260,000 weights.
"""

import copy
import json
import math
import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

import secateur as sc
from secateur.integrations.transformers import PruneCallback

SPARSITY, LENGTH = 0.6, 128
folder, file, steps = (*sys.argv[1:], "150")[:3]
STEPS = int(steps)

torch.set_num_threads(1)  # the matrices are small
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
teacher = copy.deepcopy(model)
tokenizer = AutoTokenizer.from_pretrained(folder)
with open(file, encoding="utf-8") as f:
    texts = json.load(f)


def windows(part: list[str]) -> list[dict[str, torch.Tensor]]:
    """Token ids of the texts, one after the other, in windows of equal length."""
    ids = torch.cat([tokenizer(text, return_tensors="pt", verbose=False)["input_ids"][0] for text in part])
    return [{"input_ids": w, "labels": w} for w in ids[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH)]


train, held_out = windows(texts[:-50]), windows(texts[-50:])


def perplexity() -> float:
    ids = torch.stack([w["input_ids"] for w in held_out])
    with torch.no_grad():
        return math.exp(model.eval()(input_ids=ids, labels=ids).loss.item())


print(f"dense                 {perplexity():7.3f}")
rise = sc.cubic(0, SPARSITY, begin=STEPS // 10, end=STEPS * 7 // 10)
gradual = sc.Gradual(model, sc.Magnitude(), rise, when=sc.every(5))
arguments = TrainingArguments(
    "trained",
    max_steps=STEPS,
    per_device_train_batch_size=8,
    learning_rate=3e-3,
    warmup_steps=STEPS // 20,
    report_to=[],
    save_strategy="no",
    disable_tqdm=True,
    use_cpu=not torch.cuda.is_available(),
)


def loss(output, labels, num_items_in_batch=None) -> torch.Tensor:
    own = model.loss_function(logits=output.logits, labels=labels, vocab_size=model.config.vocab_size)
    return distill(own, output)


with sc.Distill(model, teacher, weight=0.5) as distill:
    Trainer(
        model,
        arguments,
        train_dataset=train,
        compute_loss_func=loss,
        callbacks=[PruneCallback(gradual)],
    ).train()

report = gradual.report()
print(f"{report.sparsity:.0%} removed           {perplexity():7.3f}")
sc.save(model, "pruned", report=report, source=folder)
again = AutoModelForCausalLM.from_pretrained("pruned")  # plain transformers from here on
prompt = tokenizer("Once upon a time", return_tensors="pt")
print(tokenizer.decode(again.generate(**prompt, max_new_tokens=40, do_sample=False)[0]))
