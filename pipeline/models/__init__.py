"""Models and scorers that steps load, by import path or from files that are checked first."""
