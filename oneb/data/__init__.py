"""Token files, tokenizers, sources of text, and the batch loader."""
