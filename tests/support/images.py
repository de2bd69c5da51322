"""Images made for a test."""

from PIL import Image


def write_red_image(path):
    Image.new("RGB", (32, 32), "red").save(path)
    return path.read_bytes()
