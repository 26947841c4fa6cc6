"""Images and labels from files: IDX as MNIST has it, and npz; and how pixels are scaled for a model."""

from __future__ import annotations

import dataclasses
import gzip
import json
import math
import zipfile
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int, UInt8

from flaxcompress.config import Patches
from flaxcompress.text import PIXELS, Assets

_UNSIGNED_BYTE = 8


class Images(NamedTuple):
    """Images, grey where there is no axis of channels, and their classes."""

    images: UInt8[np.ndarray, "n height width *channels"]
    labels: Int[np.ndarray, " n"]


class PixelScale(NamedTuple):
    """What pixels between 0 and 1 become for a model: (x - mean) / std, for each channel, or for all alike."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


def pixel_scale(assets: Assets) -> PixelScale | None:
    """What preprocessor_config.json says; None where there is none. Raises ValueError for a damaged one."""
    content = assets.file(PIXELS)
    if content is None:
        return None
    try:
        stated = json.loads(content)
        factor = float(stated.get("rescale_factor", 1 / 255)) if stated.get("do_rescale", True) else 1.0
        given = (stated["image_mean"], stated["image_std"]) if stated.get("do_normalize", True) else (0.0, 1.0)
        scale = [tuple(float(x) / (255 * factor) for x in np.atleast_1d(value)) for value in given]
    except (
        UnicodeDecodeError,
        json.JSONDecodeError,
        KeyError,
        TypeError,
        ValueError,
        AttributeError,
        ArithmeticError,
    ) as error:
        raise ValueError(f"{PIXELS}: does not say how pixels are scaled ({type(error).__name__}: {error})") from None
    return PixelScale(*scale)


def with_pixel_scale(assets: Assets, patches: Patches, mean: Any, std: Any) -> Assets:
    """Assets that say how pixels are scaled, for all channels or each, as transformers reads it too."""
    mean, std = (np.broadcast_to(np.asarray(x, np.float64), patches.channels).tolist() for x in (mean, std))
    stated = {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": {"height": patches.height, "width": patches.width},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": mean,
        "image_std": std,
    }
    others = tuple((name, content) for name, content in assets.files if name != PIXELS)
    return dataclasses.replace(assets, files=(*others, (PIXELS, (json.dumps(stated, indent=2) + "\n").encode())))


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
