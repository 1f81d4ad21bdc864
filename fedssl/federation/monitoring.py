"""What looks like a collapse of the representation, a drifting client or lost images."""

from collections.abc import Mapping, Sequence
from statistics import median_low

from fedssl.runs.metrics import ClientMetrics, RoundMetrics

COLLAPSED_UNIFORMITY = -0.1  # 0: all in one point; 32 held-out digits give -1 to -3
COLLAPSED_RANK = 2.0  # 1: all on one line
DRIFTING_NORM = 3.0  # times the clients' median
DRIFTING_COSINE = -0.2  # below: against what the others learned; 0 is no relation


def find_warnings(metrics: RoundMetrics, earlier: Mapping[int, int] | None = None) -> list[str]:
    """Say of a round's numbers what looks wrong.

    Args:
        earlier: how many images each partition trained on when it last did.
    """
    found = []
    uniformity, rank = metrics.uniformity, metrics.effective_rank
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
    found += _find_drift(metrics.clients)
    found += [
        f"{client.who} says that it has {client.num_examples:,} images, far more than the others; "
        f"it counts for {client.weight:,} (max_weight_ratio)"
        for client in metrics.clients
        if client.weight is not None
    ]
    found += [
        f"{client.who} cut {client.numbers_cut:,} numbers of its update (secagg.largest)"
        for client in metrics.clients
        if client.numbers_cut
    ]
    return found + _find_images(metrics.clients, earlier or {})


def _find_images(clients: Sequence[ClientMetrics], earlier: Mapping[int, int]) -> list[str]:
    """Say whose images can't be read, have vanished or have become more."""
    found = []
    for client in clients:
        now, before = client.num_examples, earlier.get(client.partition)
        if now is not None and before is not None and now != before:
            what = "some have vanished" if now < before else "some were added"
            found.append(f"{client.who} trained on {now} images, {before} before: {what}")
        if unread := client.unreadable_images:
            every = (
                f" of {unread + now + client.num_held_out}" if now and client.num_held_out else ""
            )
            images = "image" if unread == 1 else "images"
            found.append(f"{client.who} left out {unread} unreadable {images}{every}")
    return found


def _find_drift(clients: Sequence[ClientMetrics]) -> list[str]:
    norms = {c.partition: c.update_norm for c in clients if c.update_norm is not None}
    if len(norms) < 3:  # of two, nobody knows which one drifts
        return []
    found = []
    usual = median_low(norms.values())
    for client in clients:
        norm, cosine = norms.get(client.partition), client.cosine
        name = f"{client.who} drifts away"
        if norm is None:
            continue
        if norm > DRIFTING_NORM * usual > 0:
            found.append(f"{name}: its update norm is {norm / usual:.1f} times the round's median")
        elif cosine is not None and cosine < DRIFTING_COSINE:
            found.append(f"{name}: it moves against the others (cosine {cosine:.2f})")
    return found
