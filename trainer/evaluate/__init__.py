"""Evaluations of a trained model, one file per task; the result is CLIP_benchmark's JSON."""
