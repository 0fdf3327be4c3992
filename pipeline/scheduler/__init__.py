"""Runs a recipe on Ray: cuts it into passes, streams units through them, and commits the results of each unit."""
