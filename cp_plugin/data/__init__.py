"""Images as the hosts hold them: keys, labels, data sets opened before their augmentation.

`images` (keys, canonical form), `chain` (the data sets inside a data set), `labelled` (labels and
class names), `opened` (the host's transform taken off), `poisoned` (a poison added before it),
`held` (added once, where images are in memory), `photos` (the embedded photographs), `sources`
(`data.dataset` by name).
"""

from cp_plugin.data.images import Canonical, image_key
from cp_plugin.data.labelled import class_names, labels
from cp_plugin.data.opened import Item, Opened, SampleError
from cp_plugin.data.photos import Photos
from cp_plugin.data.poisoned import Poisoned
from cp_plugin.data.sources import FlatFolder, load

__all__ = [
    "Canonical",
    "FlatFolder",
    "Item",
    "Opened",
    "Photos",
    "Poisoned",
    "SampleError",
    "class_names",
    "image_key",
    "labels",
    "load",
]
