"""`lit-align test` and `lit-align predict`."""
