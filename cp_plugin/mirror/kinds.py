"""Numbers of the steps of a ColorJitter."""

BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)
