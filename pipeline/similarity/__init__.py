"""Finds near copies among hashes, and reads and clusters embeddings."""
