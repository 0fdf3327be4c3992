"""Evaluations of a trained model, one file per task; each prints CLIP_benchmark's JSON."""
