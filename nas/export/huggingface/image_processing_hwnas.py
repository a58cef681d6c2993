"""Pictures as the networks of hwnas want them, for folders that load without hwnas.

This file is exported beside the weights of a ViT.

Shapes: B pictures, C channels, H height, W width.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from transformers.image_processing_base import BatchFeature
from transformers.image_processing_utils import BaseImageProcessor

MODES = {1: "L", 3: "RGB"}
"""Of Pillow, by the number of channels."""


class HwnasImageProcessor(BaseImageProcessor):  # type: ignore[misc, unused-ignore]
    """Averages a picture's pixels to the network's size, rounds their brightness and scales it.

    Args:
        size: ``{"height": H, "width": W}``.
        num_channels: C; 1 for grey, 3 for colour.
        white: what full brightness counts; black is 0, and all is rounded to whole numbers.
        image_mean: is subtracted.
        image_std: is divided by, after that.
        kwargs: see `BaseImageProcessor`.
    """

    model_input_names = ["pixel_values"]  # noqa: RUF012, transformers says so

    def __init__(
        self,
        size: dict[str, int] | None = None,
        num_channels: int = 1,
        white: int = 255,
        image_mean: float = 0.0,
        image_std: float = 1.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.size = size or {"height": 1, "width": 1}
        self.num_channels, self.white = num_channels, white
        self.image_mean, self.image_std = image_mean, image_std

    def preprocess(self, images: Any, return_tensors: str | None = None, **kwargs: Any) -> Any:
        """Return the images as ``pixel_values`` (B, C, H, W), float32.

        Args:
            images: a picture of Pillow, an array (H, W) or (H, W, C) of bytes, or several of them;
                of any size.
            return_tensors: ``"pt"`` or ``"np"``.
            kwargs: not used.

        Raises:
            ValueError: for an array that is no picture.
        """
        several = images if isinstance(images, list | tuple) else [images]
        values = [self._values(picture) for picture in several]
        return BatchFeature({"pixel_values": values}, tensor_type=return_tensors)

    def _values(self, picture: Any) -> np.ndarray[Any, np.dtype[np.float32]]:
        from PIL import Image

        if not isinstance(picture, Image.Image):
            picture = Image.fromarray(_bytes(picture))
        picture = picture.convert(MODES[self.num_channels])
        size = (self.size["width"], self.size["height"])
        if picture.size != size:
            picture = picture.resize(size, Image.Resampling.BOX)
        pixels_HWC = np.asarray(picture, np.float64).reshape(*size[::-1], self.num_channels)
        levels_CHW = np.rint(pixels_HWC.transpose(2, 0, 1) * (self.white / 255))
        return ((levels_CHW - self.image_mean) / self.image_std).astype(np.float32)


def _bytes(picture: Any) -> np.ndarray[Any, np.dtype[np.uint8]]:
    array = np.asarray(picture)
    if array.dtype != np.uint8 or array.ndim not in (2, 3):
        raise ValueError(
            f"a picture was given as {array.ndim} axes of {array.dtype}; give one of Pillow, or "
            "uint8 with the axes height, width and perhaps channels"
        )
    return array[..., 0] if array.ndim == 3 and array.shape[-1] == 1 else array
