"""Blurs one pixel at a time, from the definitions of OpenCV's documentation."""

import numpy as np

_GAUSSIAN = {
    3: np.array([0.25, 0.5, 0.25]),
    5: np.array([0.0625, 0.25, 0.375, 0.25, 0.0625]),
    7: np.array([0.03125, 0.109375, 0.21875, 0.28125, 0.21875, 0.109375, 0.03125]),
}


def _windows(image, size, mode):
    before, after = size // 2, (size - 1) // 2
    padded = np.pad(image.astype(np.float64), ((before, after), (before, after), (0, 0)), mode)
    for row, column, channel in np.ndindex(image.shape):
        window = padded[row : row + size, column : column + size, channel]
        yield (row, column, channel), window


def mean(image, size):
    out = np.zeros(image.shape)
    for place, window in _windows(image, size, "reflect"):
        out[place] = window.mean()
    return out


def gaussian(image, size):
    kernel = np.outer(_GAUSSIAN[size], _GAUSSIAN[size])
    out = np.zeros(image.shape)
    for place, window in _windows(image, size, "reflect"):
        out[place] = np.floor((window * kernel).sum() + 0.5)
    return out


def median(image, size):
    out = np.zeros(image.shape)
    for place, window in _windows(image, size, "edge"):
        out[place] = np.median(window)
    return out
