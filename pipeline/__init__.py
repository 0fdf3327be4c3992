"""Winnow's curation pipeline: from tables of image URLs and captions to WebDataset shards."""
