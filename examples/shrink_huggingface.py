"""Remove neurons and attention groups from a Hugging Face language model, and whole blocks from a copy.

    pip install 'secateur[hf]' && python examples/shrink_huggingface.py MODEL_DIR TEXT_FILE

The same from the shell: secateur shrink MODEL_DIR --params 0.9 --data TEXT_FILE --out small
"""

import copy
import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import secateur as sc
from secateur import layers

folder, text_file = sys.argv[1:3]
model = AutoModelForCausalLM.from_pretrained(folder).eval()
tokenizer = AutoTokenizer.from_pretrained(folder)

with open(text_file, encoding="utf-8") as f:
    ids = tokenizer(f.read(), return_tensors="pt")["input_ids"]
windows = ids[:, : 17 * 128].split(128, dim=1)
batches = [{"input_ids": window, "labels": window} for window in windows[:16]]
held_out = windows[16]
example = {"input_ids": held_out[:, :32], "use_cache": False}


def loss(one: torch.nn.Module) -> float:
    """Mean loss of a token of a window that no score has seen."""
    with torch.no_grad():
        return one(input_ids=held_out, labels=held_out).loss.item()


print(f"dense            {loss(model):.3f}")
without_blocks = copy.deepcopy(model)

report = sc.shrink_(
    model,
    example,
    sc.Budget.params(0.9),
    criterion=sc.HeadImportance(),
    kinds=("neurons", "kv_groups"),
    batches=batches,
)
print(report)
print(f"without units    {loss(model):.3f}")
sc.save(model, "small", report=report, source=folder)

scores = layers.block_influence(without_blocks, batches)
layers.drop_layers_(without_blocks, layers.lowest(scores, 1), example)
print(f"without a block  {loss(without_blocks):.3f}")

prompt = tokenizer("Once upon a time", return_tensors="pt")
print(tokenizer.decode(model.generate(**prompt, max_new_tokens=20, do_sample=False)[0]))
