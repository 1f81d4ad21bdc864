"""SimSiam: the predictor tells the same network's projection, through which no gradient goes.

Chen and He, "Exploring Simple Siamese Representation Learning", https://arxiv.org/abs/2011.10566.
"""

from collections.abc import Sequence

from torch import Tensor

from fedssl.methods.predicted import Predicted


class SimSiam(Predicted):
    """An encoder, heads and predictors; half of `distance` minus one is the paper's loss."""

    def targets(self, views: Tensor, projections: Sequence[Tensor]) -> Sequence[Tensor]:
        """Give the projections themselves."""
        return [each.detach() for each in projections]
