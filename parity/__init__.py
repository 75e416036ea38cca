"""PyTorch on one side, taid_jax on the other."""
