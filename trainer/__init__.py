"""Winnow's trainer: pretrains a CLIP on shards, evaluates it, exports it. The shards are the whole interface."""
