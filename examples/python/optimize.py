"""A transformers model on bitgen's kernels: give a BitNet checkpoint, a folder or a name on the hub."""

import sys

from transformers import AutoModelForCausalLM, AutoTokenizer

import bitgen.hf

model = bitgen.hf.optimize(AutoModelForCausalLM.from_pretrained(sys.argv[1]))
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
ids = model.generate(**tokenizer("And God said", return_tensors="pt"), max_new_tokens=16, do_sample=False)
print(tokenizer.decode(ids[0]))
