"""What looks like a collapse of the representation or a drifting client."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

COLLAPSED_UNIFORMITY = -0.1  # 0: all in one point; 32 held-out digits give -1 to -3
COLLAPSED_RANK = 2.0  # 1: all on one line
DRIFTING_STEP = 3.0  # times the clients' median
DRIFTING_COSINE = -0.2  # below: against what the others learned; 0 is no relation


def find_warnings(row: Mapping[str, Any]) -> list[str]:
    """Say of a round's metrics line what looks like a collapse or a drifting client."""
    found = []
    uniformity, rank = row["uniformity"], row["effective_rank"]
    if uniformity is not None and uniformity > COLLAPSED_UNIFORMITY:
        found.append(
            f"the representation has collapsed to a point (uniformity {uniformity:.3f}); "
            "lower the learning rate or raise train.batch_size"
        )
    elif rank is not None and rank < COLLAPSED_RANK:
        found.append(
            f"the representation has collapsed to a line (effective rank {rank:.2f}); lower "
            "the learning rate or raise train.batch_size"
        )
    return found + _find_drift([c for c in row["clients"] if "step" in c])


def _find_drift(clients: Sequence[Mapping[str, Any]]) -> list[str]:
    if len(clients) < 3:  # of two, nobody knows which one drifts
        return []
    found = []
    steps = torch.tensor([client["step"] for client in clients])
    for client, step in zip(clients, steps, strict=True):
        name, cosine = f"client {client['partition']} drifts away", client["cosine"]
        times = float(step / steps.median()) if steps.median() > 0 else 0.0
        if times > DRIFTING_STEP:
            found.append(f"{name}: its step is {times:.1f} times as long as usual this round")
        elif cosine is not None and cosine < DRIFTING_COSINE:
            found.append(f"{name}: it moves against the others (cosine {cosine:.2f})")
    return found
