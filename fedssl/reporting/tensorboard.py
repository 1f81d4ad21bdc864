"""What TensorBoard shows of a round."""

from collections.abc import Mapping
from typing import Any

CURVES = (
    *("train_loss", "eval_loss", "knn", "alignment", "uniformity", "effective_rank"),
    *("seconds", "images_per_second"),
)
CLIENT_CURVES = ("train_loss", "eval_loss", "step", "cosine")


def scalars(row: Mapping[str, Any]) -> dict[str, float]:
    """List what TensorBoard shows of a round's metrics line.

    A section for each curve of the clients, `client_NAME/PARTITION`, so that
    the clients stand side by side.
    """
    found = {name: row[name] for name in CURVES}
    for client in row["clients"]:
        for name in CLIENT_CURVES:
            found[f"client_{name}/{client['partition']}"] = client.get(name)
    return {tag: value for tag, value in found.items() if value is not None}
