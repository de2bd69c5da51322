"""`lit-align import`."""
