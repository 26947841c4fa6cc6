"""Images and labels from files: IDX as MNIST has it, and npz."""

from __future__ import annotations

import gzip
import math
import zipfile
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Int, UInt8

_UNSIGNED_BYTE = 8


class Images(NamedTuple):
    """Images, grey where there is no axis of channels, and their classes."""

    images: UInt8[np.ndarray, "n height width *channels"]
    labels: Int[np.ndarray, " n"]


def read_idx(path: str | Path) -> np.ndarray:
    """An IDX file of bytes, plain or gzip: two zero bytes, the type, the number of axes, their sizes, the content.

    Raises FileNotFoundError, and ValueError for a file that is damaged or of another kind.
    """
    path = _existing(path)
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: damaged gzip ({str(error).rstrip('.')}); fetch it again") from None
    if len(content) < 4 or content[:2] != b"\0\0" or content[2] != _UNSIGNED_BYTE or not content[3]:
        raise ValueError(f"{path}: no IDX file of bytes: it begins with {content[:4].hex(' ') or 'nothing'}")
    axes = content[3]
    shape = tuple(int.from_bytes(content[4 + 4 * i : 8 + 4 * i], "big") for i in range(axes))
    values = content[4 + 4 * axes :]
    if len(values) != math.prod(shape):
        raise ValueError(f"{path}: damaged: {len(values)} bytes, but {math.prod(shape)} for the stated shape {shape}")
    return np.frombuffer(values, np.uint8).reshape(shape)


def read_images(images: str | Path, labels: str | Path | None = None) -> Images:
    """Images and labels of two IDX files, or of one npz file with the arrays `images` and `labels`.

    Raises:
      FileNotFoundError: no such file.
      ValueError: a damaged file, no images, different numbers of images and labels, images that are not bytes.
    """
    if labels is None:
        found = _read_npz(_existing(images))
    else:
        found = Images(read_idx(images), read_idx(labels).astype(np.int32))
    return check_images(found, str(images))


def check_images(found: Images, where: str) -> Images:
    """Raises ValueError where images and labels do not fit each other."""
    pixels, labels = found
    if pixels.ndim not in (3, 4) or pixels.dtype != np.uint8:
        raise ValueError(
            f"{where}: images must be bytes [n, height, width] or [n, height, width, channels], got {pixels.dtype} "
            f"{list(pixels.shape)}"
        )
    if labels.shape != pixels.shape[:1] or not len(labels):
        raise ValueError(f"{where}: {len(pixels)} images, but labels of shape {list(labels.shape)}; give one for each")
    if labels.min() < 0:
        raise ValueError(f"{where}: labels must be 0 or more, got {labels.min()}")
    return found


def _existing(path: str | Path) -> Path:
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    return path


def _read_npz(path: Path) -> Images:
    try:
        with np.load(path, allow_pickle=False) as content:
            return Images(content["images"], content["labels"].astype(np.int32))
    except KeyError as error:
        raise ValueError(f"{path}: has no array {error}; npz files need images and labels") from None
    except (ValueError, OSError, EOFError, zipfile.BadZipFile, zlib.error, AttributeError, TypeError) as error:
        raise ValueError(f"{path}: damaged or no npz file ({error}); IDX images need their labels' file too") from None
