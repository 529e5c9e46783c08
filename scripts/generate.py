"""Prints what a checkpoint says after a prompt, greedily: `python scripts/generate.py DIR PROMPT [TOKENS]`."""

import sys

from transformers import AutoTokenizer, logging

import quantplan


def main(directory: str, prompt: str, tokens: str = "24") -> None:
    """Loads `directory` with transformers and prints the prompt and `tokens` more tokens."""
    logging.set_verbosity_error()
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = quantplan.load(directory)
    inputs = tokenizer(prompt, return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=int(tokens), do_sample=False)
    print(tokenizer.decode(output[0], skip_special_tokens=True))


if __name__ == "__main__":
    main(*sys.argv[1:])
