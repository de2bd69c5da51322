"""Images made for a test."""

from PIL import Image


def write_red_image(path):
    """Write a red PNG and return its bytes."""
    Image.new("RGB", (32, 32), "red").save(path)
    return path.read_bytes()
