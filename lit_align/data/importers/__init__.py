"""From preference data as others publish or keep it to shards with an index."""
