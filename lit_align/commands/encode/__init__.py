"""`lit-align encode`."""
