"""`lit-align inspect`."""
