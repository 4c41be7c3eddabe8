"""Data: from the name of a source to labelled uint8 images in three splits, with what was found by looking."""

from convette.data._examples import BadImage
from convette.data._load import ImageData, load_data
from convette.data._preprocessing import Preprocessing, load_image
from convette.data._splits import Batch, ImageSplit, MemorySplit, StreamedSplit
from convette.data._statistics import channel_statistics

__all__ = [
    "BadImage",
    "Batch",
    "ImageData",
    "ImageSplit",
    "MemorySplit",
    "Preprocessing",
    "StreamedSplit",
    "channel_statistics",
    "load_data",
    "load_image",
]
