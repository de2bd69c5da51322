"""report.html of `lit-align test`."""
