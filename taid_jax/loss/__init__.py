"""Pure functions of arrays: objectives, their reductions, the fused head."""
