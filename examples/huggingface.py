"""Prune a Hugging Face folder to 2:4 with activations, and generate with the result.

    pip install 'secateur[hf]' && python examples/huggingface.py MODEL_DIR TEXT_FILE

The same from the shell: secateur prune MODEL_DIR --method wanda --pattern 2:4 --data TEXT_FILE --out pruned
"""

import sys

from transformers import AutoModelForCausalLM, AutoTokenizer

import secateur as sc

folder, text_file = sys.argv[1:3]
model = AutoModelForCausalLM.from_pretrained(folder)
tokenizer = AutoTokenizer.from_pretrained(folder)

with open(text_file, encoding="utf-8") as f:
    ids = tokenizer(f.read(), return_tensors="pt")["input_ids"]
batches = [{"input_ids": window} for window in ids[:, : 16 * 256].split(256, dim=1)]

report = sc.prune_(model, sc.Wanda(), 0.5, pattern=sc.NM(2, 4), batches=batches)
print(report)
sc.save(model, "pruned", report=report, source=folder)

again = AutoModelForCausalLM.from_pretrained("pruned")  # plain transformers from here on
prompt = tokenizer("Once upon a time", return_tensors="pt")
print(tokenizer.decode(again.generate(**prompt, max_new_tokens=40, do_sample=False)[0]))
