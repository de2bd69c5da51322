"""What aligned models draw, and how they fare against the base."""
