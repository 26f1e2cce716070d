"""Images as the hosts hold them: data sets read before their augmentation, keys, labels, batches.

`image` (canonical form, keys), `wrappers` (the data sets inside a data set), `labels` (labels and
class names), `raw` (the host's transform taken off), `raw_stream` (that of a stream), `raw_images`
and `probe` (what both use), `slots` (where views stand in a sample), `kept` (samples that a data
set keeps), `channels` (grey images, and channels that a poison cannot keep), `transformed` (images
changed before the transform), `stream` (those of a stream), `in_memory` (changed once),
`batch`, `loading`, `subset`, `pipelines` (what makes several views), `photos` (the embedded
photographs), `picture_files` (files in folders), `picture_pixels` and `png16` (files of any kind,
changed), `picture_cache` (pictures decoded once), `canonical` (which size is canonical), `fit`
(delta at any size), `datasets` (`data.dataset` by name).
"""

from cp_plugin.data.datasets import FlatFolder, load, no_downloads
from cp_plugin.data.image import Canonical, image_key
from cp_plugin.data.labels import class_names, labels, names_or_numbers
from cp_plugin.data.photos import Photos
from cp_plugin.data.raw import RawDataset
from cp_plugin.data.raw_images import Item, SampleError
from cp_plugin.data.raw_stream import RawStream
from cp_plugin.data.stream import PreTransformStream, stream_classes, streams
from cp_plugin.data.transformed import PreTransformDataset, changes_in, clean_dataset

__all__ = [
    "Canonical",
    "FlatFolder",
    "Item",
    "Photos",
    "PreTransformDataset",
    "PreTransformStream",
    "RawDataset",
    "RawStream",
    "SampleError",
    "changes_in",
    "class_names",
    "clean_dataset",
    "image_key",
    "labels",
    "load",
    "names_or_numbers",
    "no_downloads",
    "stream_classes",
    "streams",
]
