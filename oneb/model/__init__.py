"""The decoder-only transformer: attention, blocks, KV cache."""
