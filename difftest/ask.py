"""Asking a pair about many images when one of them may break it."""

import numpy as np

from difftest.pair import ModelError, ModelPair


def ask(
    pair: ModelPair, images: np.ndarray, classes: int | None = None
) -> tuple[np.ndarray, np.ndarray, list[str | None]]:
    """Both models' probabilities, and for each image the error it caused or None.

    If the batch fails, its images are asked one by one, so that one of them does not cost the
    others their answer.

    Args:
        pair: the models.
        images: uint8 ``[B, H, W, C]``.
        classes: what the models gave before; None: not known yet.

    Returns:
        float32 ``[B, K]`` twice, rows of zeros where there is an error, and ``[B]`` errors. K is
        0 where every image failed and the number of classes is not known.
    """
    if not len(images):
        nothing = np.zeros((0, classes or 0), np.float32)
        return nothing, nothing, []
    try:
        return *_checked(pair, images, classes), [None] * len(images)
    except ModelError:
        pass
    answers: list[tuple[np.ndarray, np.ndarray] | None] = []
    errors: list[str | None] = []
    for image in images:
        try:
            answers.append(_checked(pair, image[None], classes))
            errors.append(None)
        except ModelError as error:
            answers.append(None)
            errors.append(str(error))
    known = next((answer for answer in answers if answer is not None), None)
    size = (classes or 0) if known is None else known[0].shape[1]
    original, compressed = np.zeros((2, len(images), size), np.float32)
    for row, answer in enumerate(answers):
        if answer is not None:
            original[row], compressed[row] = answer[0][0], answer[1][0]
    return original, compressed, errors


def _checked(
    pair: ModelPair, images: np.ndarray, classes: int | None
) -> tuple[np.ndarray, np.ndarray]:
    original, compressed = pair.probabilities(images)
    if classes is not None and original.shape[1] != classes:
        raise ModelError(f"the models gave {original.shape[1]} classes, before it was {classes}")
    return original, compressed
