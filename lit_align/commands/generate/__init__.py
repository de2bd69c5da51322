"""`lit-align generate`."""
