"""Text and chat to batches of token ids and labels."""
