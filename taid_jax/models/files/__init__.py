"""Everything that reads or writes a model: folders, GGUF files, tokenizers."""
