"""Knowledge distillation of language models in JAX and Flax, built round TAID."""
