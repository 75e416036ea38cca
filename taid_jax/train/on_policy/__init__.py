"""Training on completions that a model writes: prompts, generation, buffer."""
