"""A local page on which to move the cuts of a run and see immediately what would be kept."""
