"""What can be had without any encoder."""

import warnings

import numpy as np
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression

from fedssl.evaluation.base import EvaluationData
from fedssl.runs.results import Score

MAX_STEPS = 200  # digits need 70; large images are stopped


def score_raw_pixels(data: EvaluationData) -> Score:
    """Score logistic regression on the pixels of the images in their own size."""
    scores = []
    test = _flatten(data.test.pixels)
    for labelled in data.labelled:
        classifier = LogisticRegression(max_iter=MAX_STEPS)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            classifier.fit(_flatten(data.train.pixels[labelled]), data.train.labels[labelled])
        scores.append(float(classifier.score(test, data.test.labels)))
    return Score("raw pixels", "logistic regression", scores)


def _flatten(pixels: np.ndarray) -> np.ndarray:
    """Turn uint8 (N, 3, S, S) into float32 (N, 3 * S * S) in [0, 1]."""
    return pixels.reshape(len(pixels), -1) / np.float32(255)
