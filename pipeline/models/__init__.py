"""Models and scorers that steps load: named by import path, or read from a file and checked."""
