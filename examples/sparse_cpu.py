"""A pruned language model that computes without its zeros on an ordinary CPU, and a file that is smaller.

    pip install 'secateur[hf]' && python examples/sparse_cpu.py MODEL_DIR TEXT_FILE [SPARSITY]

The same from the shell, after secateur prune: secateur bench pruned --dtype int8 --save fast
"""

import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import secateur as sc

torch.set_num_threads(1)  # per core, as the times of a server's cores are counted
folder, text_file, sparsity = (*sys.argv[1:], "0.7")[:3]
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
tokenizer = AutoTokenizer.from_pretrained(folder)
with open(text_file, encoding="utf-8") as f:
    ids = tokenizer(f.read(), return_tensors="pt")["input_ids"]
batches = [{"input_ids": window} for window in ids[:, : 8 * 256].split(256, dim=1)]
sc.prune_(model, sc.SparseGPT(), float(sparsity), batches=batches)
sc.save(model, "pruned", source=folder, compressed=True)

fast = sc.runtime.compress(model, dtype=torch.int8)  # measures each kind of layer on this machine
print(fast.compress_report)
print(sc.runtime.bench_text(model, fast, prompt=64, new=16, runs=2))
sc.save(fast, "fast", source=folder)

fast = sc.load("fast")  # without its dense weights, and without measuring again
prompt = tokenizer("Once upon a time", return_tensors="pt")
print(tokenizer.decode(fast.generate(**prompt, max_new_tokens=40, do_sample=False)[0]))


def megabytes(of: str) -> float:
    """Of all tensors in a folder."""
    return sum(path.stat().st_size for path in Path(of).glob("*.safetensors")) / 1e6


sizes = {"dense": megabytes(folder), "pruned": megabytes("pruned"), "fast": megabytes("fast")}
print(", ".join(f"{name} {size:.1f} MB" for name, size in sizes.items()))
