"""WebDataset shards: their storage, layout, index and writer, and the scan that finds the pairs that train."""
