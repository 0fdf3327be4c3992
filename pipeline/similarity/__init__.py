"""Near copies among hashes, and vectors as matrices."""
