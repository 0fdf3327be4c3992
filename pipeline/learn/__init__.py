"""Fits a mixture of a run's stored scores to labelled rows."""
