"""What goes beside the pictures of a finished dataset: its card, Croissant metadata, and the JSON of a sample."""
