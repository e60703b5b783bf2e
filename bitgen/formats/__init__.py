"""Model files in and out: GGUF and Hugging Face folders as config, weights and tokenizer data.

`bitgen.formats.open.open_model` reads a GGUF file or a Hugging Face folder into a `ModelFile`.
"""
