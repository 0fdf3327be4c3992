"""A local page to move the cuts of a run and see at once what would be kept."""
