"""WebDataset shards: layout, index, scan, writer, storage."""
