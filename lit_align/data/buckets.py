"""Buckets by aspect ratio, so that images need not be cropped to a square."""

import numpy as np
from numpy.typing import NDArray

Shape = tuple[int, int]  # height and width, pixels

# SDXL's training buckets (arXiv 2307.01952, appendix I): these and their transposes, except 1344 x 704.
SDXL_LANDSCAPE: tuple[Shape, ...] = (
    (512, 2048), (512, 1984), (512, 1920), (512, 1856), (576, 1792), (576, 1728), (576, 1664), (640, 1600),
    (640, 1536), (704, 1472), (704, 1408), (704, 1344), (768, 1344), (768, 1280), (832, 1216), (832, 1152),
    (896, 1152), (896, 1088), (960, 1088), (960, 1024), (1024, 1024),
)  # fmt: skip
SDXL_BUCKETS = sorted({*SDXL_LANDSCAPE, *((width, height) for height, width in SDXL_LANDSCAPE)} - {(1344, 704)})
SDXL_RESOLUTION = 1024  # side of the square bucket, pixels


def bucket_shapes(resolution: int) -> list[Shape]:
    """Scale SDXL's buckets to a resolution, the side of the square bucket in pixels.

    As in SDXL, sides are multiples of a sixteenth of the resolution; VAEs also need multiples of 8.
    """
    step = max(8, round(resolution / 16 / 8) * 8)
    scale = resolution / SDXL_RESOLUTION / step
    return sorted({(round(height * scale) * step, round(width * scale) * step) for height, width in SDXL_BUCKETS})


def assign_buckets(sizes: NDArray[np.int32], shapes: list[Shape]) -> NDArray[np.int64]:
    """Assign each pair to the bucket with the nearest logarithm of the aspect ratio.

    Both images of a pair share a bucket, so the aspect ratio of a pair is the geometric mean of its images' ratios.

    Args:
        sizes: (pairs, 4) height and width of image 0 and of image 1, pixels.
        shapes: of the buckets.

    Returns:
        (pairs,) position of each pair's bucket in `shapes`.
    """
    ratios = np.log([height / width for height, width in shapes])
    order = np.argsort(ratios, kind="stable")
    edges = (ratios[order][1:] + ratios[order][:-1]) / 2
    wanted = np.log(sizes[:, 0::2] / sizes[:, 1::2]).mean(1)
    chosen: NDArray[np.int64] = order[np.searchsorted(edges, wanted)]
    return chosen
