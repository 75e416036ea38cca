"""The train step, its state, checkpoints and the host loop."""
