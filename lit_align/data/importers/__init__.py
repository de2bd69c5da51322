"""Import published or own preference data into shards with an index."""
