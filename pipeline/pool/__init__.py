"""A pool (parquet, csv, tsv, jsonl, json or wat; one file or thousands) as batches of clean rows.

`columns` checks everything in the files' heads (a parquet footer, or the first rows of a text file) and rejects
unsupported columns before a run starts. `splits` divides the pool into pieces that are read in parallel. `read` yields
each row of a split exactly once: clean, or with the reason why it is unusable.
"""

from pipeline.pool.column_types import columns
from pipeline.pool.files import PoolError, find_files, stamp
from pipeline.pool.heads import Split, size, splits
from pipeline.pool.rows import REASONS, count, read

__all__ = ["REASONS", "PoolError", "Split", "columns", "count", "find_files", "read", "size", "splits", "stamp"]
