"""Runs a recipe on Ray: cuts it into passes, streams units through them, and commits what each unit gives."""
