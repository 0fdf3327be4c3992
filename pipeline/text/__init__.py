"""Normal forms of captions and URLs, stable hashes of strings, and lists that rows are matched against."""
