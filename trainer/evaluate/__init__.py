"""Evaluations of a trained model, one file a task; each prints CLIP_benchmark's JSON."""
