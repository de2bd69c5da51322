"""Cached latents and conditioning."""
