"""`lit-align doctor`."""
