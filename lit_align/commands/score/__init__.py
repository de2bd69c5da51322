"""`lit-align score`."""
