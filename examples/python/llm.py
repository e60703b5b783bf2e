"""Text from a model: a file, a Hugging Face folder, or the tiny one that ships."""

import bitgen

with bitgen.LLM("tiny") as llm:
    for piece in llm.generate("And it came to pass", max_tokens=24, temperature=0):
        print(piece, end="", flush=True)
print()
