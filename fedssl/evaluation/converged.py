"""A linear head whose fit has converged, with the weight decay that folds of the labels choose."""

import warnings
from collections.abc import Callable

import numpy as np
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression, LogisticRegressionCV
from sklearn.model_selection import StratifiedKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits

DECAYS = (1.0, 0.3, 0.1, 0.03, 0.01, 0.003, 0.001)
FOLDS = 5
MAX_STEPS = 1000  # of L-BFGS; features of 512 numbers need some thirty


def fit_converged_head(
    features: np.ndarray, labels: np.ndarray, seed: int
) -> Callable[[np.ndarray], np.ndarray]:
    """Fit multinomial logistic regression on standardized features by L-BFGS.

    The loss is the mean cross entropy and decay / 2 * |W|^2, in which biases don't count. The
    decay is that of `DECAYS` with the best accuracy over five stratified folds; where every
    class has one label, the largest.

    Args:
        features: float32 (N, D).
        labels: int64 (N,), of two classes or more.
        seed: decides the folds.

    Returns:
        A function from features (M, D) to predicted classes (M,).
    """
    folds = min(FOLDS, int(np.bincount(labels).max()))
    strengths = [1 / (decay * len(labels)) for decay in DECAYS]
    if folds < 2:
        classifier = LogisticRegression(C=strengths[0], max_iter=MAX_STEPS)
    else:
        classifier = LogisticRegressionCV(
            Cs=strengths,
            l1_ratios=(0.0,),
            cv=StratifiedKFold(folds, shuffle=True, random_state=seed),
            scoring="accuracy",
            max_iter=MAX_STEPS,
            use_legacy_attributes=False,
        )
    pipeline = make_pipeline(StandardScaler(), classifier)
    # One thread: with few labels many would wait for each other a thousand times.
    with threadpool_limits(1), warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        warnings.filterwarnings("ignore", "The least populated class", UserWarning)
        pipeline.fit(features, labels)
    predict: Callable[[np.ndarray], np.ndarray] = pipeline.predict
    return predict
