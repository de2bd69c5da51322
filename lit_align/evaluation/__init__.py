"""Measure what aligned models draw, and compare it with what the base draws."""
