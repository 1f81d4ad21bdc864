"""Fine-tuning by rounds: sites train encoder and head on their labels, the server averages.

The head begins as the one from sums, so that the encoder is not bent by a head that knows
nothing yet (https://arxiv.org/abs/2202.10054).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from fedssl.compute import Backend
from fedssl.data.views import Augmentation
from fedssl.evaluation.features import view_logits
from fedssl.networks.encoder import Encoder
from fedssl.seeding import generator_for
from fedssl.sites.site import TuneSettings
from fedssl.sites.sums import Head

State = Mapping[str, Tensor]
LARGEST_GRADIENT = 10.0  # norm over encoder and head, as a longer one is clipped to
ENCODER = "encoder."  # before the names of its arrays in the state of a `Classifying`


class Classifying(nn.Module):
    """An encoder with a linear head: uint8 images to logits."""

    def __init__(self, encoder: Encoder, num_classes: int) -> None:
        """Put a head on an encoder, whose layers it shares."""
        super().__init__()
        device = next(encoder.parameters()).device
        self.encoder = encoder
        self.head = nn.Linear(encoder.feature_size, num_classes, device=device)


def begin_with(encoder: State, head: Head) -> dict[str, Tensor]:
    """Give the state of a `Classifying` with an encoder's state and a head."""
    state = {f"{ENCODER}{n}": value.detach().cpu().clone() for n, value in encoder.items()}
    weight, bias = torch.from_numpy(head.weight.T.copy()), torch.from_numpy(head.bias.copy())
    return {**state, "head.weight": weight, "head.bias": bias}


def take_apart(state: State) -> tuple[dict[str, Tensor], Head]:
    """Undo `begin_with`."""
    encoder = {n.removeprefix(ENCODER): v for n, v in state.items() if n.startswith(ENCODER)}
    weight, bias = (state[f"head.{name}"].numpy() for name in ("weight", "bias"))
    return encoder, Head(np.ascontiguousarray(weight.T), bias)


def tune_at_site(
    network: Classifying,
    pixels: np.ndarray,
    labels: np.ndarray,
    settings: TuneSettings,
    round_number: int,
    views: Augmentation,
    backend: Backend,
    generator: Generator,
) -> None:
    """Train a network in place for a round, by SGD with momentum 0.9.

    BatchNorm keeps its statistics, as in `FineTuning`. Gradients are clipped, since a head from
    sums may have large weights where features hardly vary.

    Args:
        pixels: uint8 (N, 3, S, S), of at least one image.
        labels: int64 (N,).
        round_number: counted from 0.
        views: of whole images' size.
        generator: on the CPU; decides order and views.

    Raises:
        FloatingPointError: the loss is not finite any more.
    """
    network.eval()
    head, encoder = list(network.head.parameters()), list(network.encoder.parameters())
    rates = settings.learning_rate, settings.encoder_learning_rate
    groups = [
        {"params": head, "lr": rates[0], "weight_decay": settings.weight_decay},
        {"params": encoder, "lr": rates[1]},
    ]
    optimizer = torch.optim.SGD(groups, momentum=0.9)
    logits_of = view_logits(network.encoder, network.head, pixels, views, backend, generator)
    targets = torch.from_numpy(labels).to(backend.device)
    batches = -(-len(labels) // settings.batch_size)
    for epoch in range(settings.epochs):
        factor = settings.rate_factor(round_number, epoch)
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * factor
        for rows in torch.randperm(len(labels), generator=generator).chunk(batches):
            loss = F.cross_entropy(logits_of(rows), targets[rows.to(targets.device)])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(network.parameters(), LARGEST_GRADIENT)
            optimizer.step()
    if not torch.isfinite(loss):
        raise FloatingPointError(
            f"the loss of fine-tuning became {float(loss)}; lower eval.encoder_learning_rate or "
            "eval.learning_rate"
        )
    network.zero_grad(set_to_none=True)


def tune_generator(seed: int, round_number: int, site: int) -> Generator:
    """Decide the order and the views of a site in a round of fine-tuning."""
    return generator_for(seed, "tune", round_number, site)


@dataclass(frozen=True)
class Tuned:
    """What a site gives back: the state of its `Classifying`, and its labelled images."""

    state: State
    images: int


def tune_by_rounds(
    state: State, rounds: int, ask: Callable[[State, int], Mapping[int, Tuned]]
) -> State:
    """Tune by FedAvg: the sites train, the mean by images is the next state.

    Args:
        ask: lets the sites train from a state in a round, counted from 0; gives by the site's
            number what those with labelled images answer.

    Raises:
        ValueError: in a round no site answered.
    """
    for round_number in range(rounds):
        tuned = ask(state, round_number)
        if not tuned:
            raise ValueError("no site has trained")
        state = average(state, list(tuned.values()))
    return state


def average(state: State, tuned: list[Tuned]) -> dict[str, Tensor]:
    """Average what sites trained, each with the weight of its images; integers stay."""
    images = sum(each.images for each in tuned)
    averaged = dict(state)
    for name, before in state.items():
        if before.is_floating_point():
            total = sum(each.images / images * each.state[name].double() for each in tuned)
            averaged[name] = torch.as_tensor(total).to(before.dtype)
    return averaged
