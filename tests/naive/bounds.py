"""Bounds of a ReLU network of dense layers, straight from the papers, one sample at a time.

`layers` are pairs (W [in, out], b [out]) in float64; every layer but the last ends in ReLU.
"""

import numpy as np

Layers = list[tuple[np.ndarray, np.ndarray]]
Box = tuple[np.ndarray, np.ndarray]


def interval(layers: Layers, lower: np.ndarray, upper: np.ndarray) -> list[Box]:
    """Ends of what each layer computes before its ReLU."""
    found = []
    for weights, bias in layers:
        up, down = np.maximum(weights, 0), np.minimum(weights, 0)
        ends = lower @ up + upper @ down + bias, upper @ up + lower @ down + bias
        found.append(ends)
        lower, upper = (np.maximum(end, 0) for end in ends)
    return found


def merged(layers: Layers, lower: np.ndarray, upper: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Interval bounds of rows of the logits, the last layer merged with the rows."""
    weights, bias = layers[-1]
    last = (weights @ rows.T, rows @ bias)
    return interval([*layers[:-1], last], lower, upper)[-1][0]


def backward(layers: Layers, boxes: list[Box], box: Box, rows: np.ndarray, slope) -> np.ndarray:
    """CROWN's lower bound of rows of the last layer's output, one number at a time.

    Args:
      layers: those below and the one the rows are on.
      boxes: of every layer below, before its ReLU.
      box: of the input.
      rows: `[M, out]`.
      slope: of the line below an unstable ReLU, from that above.
    """
    found = []
    for row in rows:
        coefficients, constant = row.astype(float), 0.0
        for depth in reversed(range(len(layers))):
            weights, bias = layers[depth]
            constant += coefficients @ bias
            coefficients = weights @ coefficients
            if depth == 0:
                break
            for i, (low, high) in enumerate(zip(*boxes[depth - 1], strict=True)):
                if high <= 0:
                    coefficients[i] = 0
                elif low < 0:
                    steep = high / (high - low)
                    if coefficients[i] < 0:
                        constant -= coefficients[i] * steep * low
                        coefficients[i] *= steep
                    else:
                        coefficients[i] *= slope(steep)
        ends = np.where(coefficients > 0, *box)
        found.append(coefficients @ ends + constant)
    return np.array(found)


def inner(layers: Layers, box: Box, slope, intersect: bool) -> list[Box]:
    """Boxes of every layer but the last, by walks back of their own."""
    boxes: list[Box] = []
    for depth in range(len(layers) - 1):
        some = layers[: depth + 1]
        eye = np.eye(len(some[-1][1]))
        low = backward(some, boxes, box, eye, slope)
        high = -backward(some, boxes, box, -eye, slope)
        if intersect:
            entering = tuple(np.maximum(end, 0) for end in boxes[-1]) if boxes else box
            (plain_low, plain_high) = interval(some[-1:], *entering)[0]
            low, high = np.maximum(low, plain_low), np.minimum(high, plain_high)
        boxes.append((low, high))
    return boxes


def zonotope(layers: Layers, box: Box, rows: np.ndarray) -> np.ndarray:
    """MixTrain's lower bound of rows of the logits: a centre and one column for each error."""
    centre = (box[0] + box[1]) / 2
    errors = np.diag((box[1] - box[0]) / 2)
    for depth, (weights, bias) in enumerate(layers):
        centre, errors = centre @ weights + bias, errors @ weights
        if depth == len(layers) - 1:
            break
        radius = np.abs(errors).sum(0)
        for i, (low, high) in enumerate(zip(centre - radius, centre + radius, strict=True)):
            if high <= 0:
                centre[i], errors[:, i] = 0, 0
            elif low < 0:
                steep = high / (high - low)
                centre[i] = steep * centre[i] - steep * low / 2
                errors[:, i] *= steep
                fresh = np.zeros((1, errors.shape[1]))
                fresh[0, i] = -steep * low / 2
                errors = np.concatenate([errors, fresh])
    return rows @ centre - np.abs(errors @ rows.T).sum(0)
