"""Flax decoders and their files."""
