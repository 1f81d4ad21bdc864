"""What a client does: local SimCLR training, its held-out loss, the ClientApp around them."""

import functools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from flwr.app import Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.clientapp.typing import Mod
from omegaconf import DictConfig, OmegaConf
from torch import Generator, Tensor

from augment import Augmentation, make_augmentation, view_size
from errors import UserError
from health import measure_health
from model import SimCLR, build_model, load_state, nt_xent
from utils import (
    Images,
    choose_device,
    choose_dtype,
    derive_seed,
    generator_for,
    open_image_set,
    partition_rows,
    split_held_out,
)
from wire import pack_state, unpack_state

ARRAYS, CONFIG, METRICS = "arrays", "config", "metrics"
HEALTH_IMAGES = 512  # the effective rank depends on how many images it is measured on


@dataclass(frozen=True)
class Optimization:
    """How a client trains in a round.

    Attributes:
        local_epochs: passes over the client's images.
        batch_size: images per step; a smaller client uses the batch it can fill.
        max_steps: steps of a round at most, 0 for no limit.
        learning_rate: peak rate at `batch_size`, scaled linearly to a smaller batch.
        momentum, weight_decay: of SGD.
        temperature: of NT-Xent.
    """

    local_epochs: int
    batch_size: int
    max_steps: int
    learning_rate: float
    momentum: float
    weight_decay: float
    temperature: float


@dataclass(frozen=True)
class TrainResult:
    """The mean NT-Xent over the steps of a round, in nats, the images used, and the pace."""

    loss: float
    images: int
    images_per_second: float


def cosine(progress: float) -> float:
    """Fall from 1 at the start of the run (0) to 0 at its end (1)."""
    return 0.5 * (1 + math.cos(math.pi * progress))


def local_train(
    model: SimCLR,
    images: np.ndarray,
    indices: np.ndarray,
    augmentation: Augmentation,
    settings: Optimization,
    *,
    run_part: tuple[float, float],
    proximal_mu: float,
    generator: Generator,
    device: torch.device,
    dtype: torch.dtype,
) -> TrainResult:
    """Train the model in place on the client's images for one round.

    Args:
        images: uint8 (N, 3, H, W), the whole image set.
        indices: which of them are this client's, at least two.
        run_part: where this round begins and ends within the run, from 0 to 1;
            the learning rate is a cosine over the whole run.
        proximal_mu: weight of FedProx's term, mu / 2 * |w - w_global|^2
            (https://arxiv.org/abs/1812.06127); 0 for none.
        generator: on the CPU; decides the order and the views.
        dtype: autocast type of the forward pass, float32 for none.

    Raises:
        ValueError: fewer than two images.
        FloatingPointError: the loss is not finite any more.
    """
    if len(indices) < 2:
        raise ValueError(f"a client needs at least 2 images to train, this one has {len(indices)}")
    batch_size = min(settings.batch_size, len(indices))
    batches_per_epoch = len(indices) // batch_size
    steps = settings.local_epochs * batches_per_epoch
    steps = min(steps, settings.max_steps) if settings.max_steps else steps
    peak = settings.learning_rate * batch_size / settings.batch_size
    optimizer = torch.optim.SGD(
        model.parameters(), lr=peak, momentum=settings.momentum, weight_decay=settings.weight_decay
    )
    anchor = [p.detach().clone() for p in model.parameters()] if proximal_mu > 0 else []
    model.train()
    losses = torch.zeros(steps, device=device)
    began = time.perf_counter()
    for step in range(steps):
        place = step % batches_per_epoch
        if place == 0:  # a new order, and so other negatives, in every epoch
            order = indices[torch.randperm(len(indices), generator=generator).numpy()]
        rows = np.sort(order[place * batch_size : (place + 1) * batch_size])
        batch = torch.from_numpy(images[rows]).to(device, non_blocking=True)
        progress = run_part[0] + (run_part[1] - run_part[0]) * step / steps
        optimizer.param_groups[0]["lr"] = peak * cosine(progress)
        losses[step] = _step(
            model, batch, augmentation, optimizer, settings.temperature, generator, dtype
        )
        if anchor:
            _pull(model, anchor, proximal_mu)
        optimizer.step()
    loss = float(losses.mean())
    if not math.isfinite(loss):
        raise FloatingPointError(f"the training loss became {loss}; lower train.learning_rate")
    elapsed = time.perf_counter() - began
    return TrainResult(loss, steps * batch_size, steps * batch_size / elapsed)


def _step(
    model: SimCLR,
    batch: Tensor,
    augmentation: Augmentation,
    optimizer: torch.optim.Optimizer,
    temperature: float,
    generator: Generator,
    dtype: torch.dtype,
) -> Tensor:
    """Compute the gradients of one batch, uint8 (B, 3, H, W); return its loss."""
    views = augmentation.two_views(batch, generator)
    with torch.autocast(batch.device.type, dtype=dtype, enabled=dtype != torch.float32):
        projections = model(views)
    loss = nt_xent(projections, temperature)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    return loss.detach()


@torch.no_grad()
def _pull(model: SimCLR, anchor: list[Tensor], mu: float) -> None:
    """Add the gradient of FedProx's term, mu * (w - w_global)."""
    for parameter, start in zip(model.parameters(), anchor, strict=True):
        if parameter.grad is not None:
            parameter.grad.add_(parameter - start, alpha=mu)


@torch.inference_mode()
def local_loss(
    model: SimCLR,
    images: np.ndarray,
    indices: np.ndarray,
    augmentation: Augmentation,
    *,
    batch_size: int,
    temperature: float,
    generator: Generator,
    device: torch.device,
    dtype: torch.dtype,
) -> tuple[float, dict[str, float]]:
    """Compute the mean NT-Xent of held-out images in eval mode, in nats.

    Args: as of `local_train`. A last batch of one image joins its neighbour.

    Returns:
        The loss, and `measure_health` of the first images, at least 512 if
        there are so many.

    Raises:
        ValueError: fewer than two images.
    """
    if len(indices) < 2:
        raise ValueError(f"a held-out loss needs at least 2 images, got {len(indices)}")
    model.eval()
    total = 0.0
    first: list[Tensor] = []
    second: list[Tensor] = []
    for rows in np.array_split(indices, max(1, len(indices) // batch_size)):
        batch = torch.from_numpy(images[np.sort(rows)]).to(device)
        views = augmentation.two_views(batch, generator)
        with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
            projections = model(views)
        total += float(nt_xent(projections, temperature)) * len(rows)
        if sum(map(len, first)) < HEALTH_IMAGES:
            first.append(projections[: len(rows)])
            second.append(projections[len(rows) :])
    return total / len(indices), measure_health(torch.cat([*first, *second]))


@dataclass(frozen=True)
class Identity:
    """Who a client is.

    Attributes:
        config_text: the run's configuration as YAML.
        partition: which of `num_partitions` parts of the data set it holds.
        data_path: its own folder of images instead; labels are not looked for.
        on_its_own: nobody else has opened and checked its images before.
    """

    config_text: str
    partition: int
    num_partitions: int
    data_path: str | None = None
    on_its_own: bool = True


def make_client_app(identify: Callable[[Context], Identity], mods: Sequence[Mod] = ()) -> ClientApp:
    """Build the ClientApp: the same for a simulated client and for a SuperNode.

    Args:
        identify: tells from a message's context who the client is.
        mods: of Flower, such as those for differential privacy; they see every
            message on its way in and out.
    """
    app = ClientApp(mods=list(mods))
    for register, answer in (
        (app.train(), train_reply),
        (app.evaluate(), evaluate_reply),
        (app.query(), query_reply),
    ):
        register(functools.partial(_answer, identify, answer))
    return app


def _answer(
    identify: Callable[[Context], Identity],
    answer: Callable[[Identity, Message], Message],
    message: Message,
    context: Context,
) -> Message:
    """Answer a message; say of an error whose it is, which Flower's error replies don't."""
    identity = identify(context)
    try:
        return answer(identity, message)
    except Exception as error:
        raise RuntimeError(f"partition {identity.partition}: {error}") from error


def simulated(config: DictConfig) -> Callable[[Context], Identity]:
    """Identify virtual clients: Flower numbers their partitions itself."""
    text = OmegaConf.to_yaml(config, resolve=True)

    def identify(context: Context) -> Identity:
        node = context.node_config
        number, count = int(node["partition-id"]), int(node["num-partitions"])
        return Identity(text, number, count, on_its_own=False)

    return identify


@dataclass
class Site:
    """What a client process keeps between messages: configuration, images, one model."""

    config: DictConfig
    pixels: np.ndarray
    partitions: list[np.ndarray]
    model: SimCLR
    device: torch.device
    dtype: torch.dtype
    augmentation: Augmentation

    def views_of(self, message: Message) -> Augmentation:
        """Give the views of a message's round; their size may grow over the rounds."""
        request, size = message.content[CONFIG], self.config.dataset.image_size
        place = int(request["server-round"]), int(request["num-rounds"])
        size = view_size(self.config.train.view_sizes, size, *place)
        return replace(self.augmentation, output_size=size)


@functools.lru_cache(maxsize=1)
def open_site(config_text: str, num_partitions: int, data_path: str | None) -> Site:
    """Open the images and build the model once per process, for all its clients."""
    config = OmegaConf.create(config_text)
    if config.num_cpus:
        torch.set_num_threads(config.num_cpus)
    device = choose_device(config.num_gpus)
    train, partitions = _open_images(config, num_partitions, data_path)
    return Site(
        config,
        train.pixels,
        partitions,
        build_model(config.model, config.dataset, config.seed, device),
        device,
        choose_dtype(config.precision, device),
        make_augmentation(config.augment, config.dataset.image_size),
    )


def _open_images(
    config: DictConfig, num_partitions: int, data_path: str | None, verify: bool = False
) -> tuple[Images, list[np.ndarray]]:
    """Open a node's own folder, all of it, or the data set that is dealt out to all."""
    places = (config.cache_dir, config.seed)
    spec = OmegaConf.to_container(config.dataset)
    if data_path is None:
        if spec["source"] == "imagefolder" and spec["path"] is None:
            raise UserError('this node has no images; put data-path="DIR" into its --node-config')
        train = open_image_set(spec, *places, verify=verify).train
        return train, partition_rows(train, num_partitions, config.partition, config.seed)
    spec |= {"source": "imagefolder", "path": data_path, "labels": False}
    try:
        train = open_image_set(spec, *places, verify=verify).train
    except UserError as error:
        raise UserError(str(error).replace("dataset.path", "data-path")) from error
    order = np.random.default_rng(derive_seed(config.seed, "partition"))
    return train, [order.permutation(len(train.pixels))]


def make_optimization(spec: Mapping[str, Any]) -> Optimization:
    """Build the settings of the `train` section."""
    return Optimization(**{field.name: spec[field.name] for field in fields(Optimization)})


def _prepare(identity: Identity, message: Message) -> tuple[Site, np.ndarray, np.ndarray]:
    """Load the message's weights; return the site and its training and held-out rows."""
    site, train, held_out = _open(identity)
    load_state(site.model, unpack_state(message.content[ARRAYS]))
    return site, train, held_out


def _open(identity: Identity) -> tuple[Site, np.ndarray, np.ndarray]:
    """Open the site of a client; return it with the rows to train on and to hold out."""
    site = open_site(identity.config_text, identity.num_partitions, identity.data_path)
    rows = site.partitions[0 if identity.data_path else identity.partition]
    return site, *split_held_out(rows, site.config.held_out)


def query_reply(identity: Identity, message: Message) -> Message:
    """Answer which partition this client holds, once its images are open, intact and enough."""
    if identity.on_its_own:
        config = OmegaConf.create(identity.config_text)
        _open_images(config, identity.num_partitions, identity.data_path, verify=True)
    _open(identity)
    metrics = {"partition-id": identity.partition}
    return Message(RecordDict({METRICS: MetricRecord(metrics)}), reply_to=message)


def train_reply(identity: Identity, message: Message) -> Message:
    """Answer a training message: the weights after a round of local training."""
    site, rows, _ = _prepare(identity, message)
    request = message.content[CONFIG]
    round_number, num_rounds = int(request["server-round"]), int(request["num-rounds"])
    result = local_train(
        site.model,
        site.pixels,
        rows,
        site.views_of(message),
        make_optimization(site.config.train),
        run_part=((round_number - 1) / num_rounds, round_number / num_rounds),
        proximal_mu=float(request.get("proximal-mu", 0.0)),
        generator=generator_for(site.config.seed, "train", round_number, identity.partition),
        device=site.device,
        dtype=site.dtype,
    )
    metrics = {
        "partition-id": identity.partition,
        "num-examples": len(rows),
        "train-loss": result.loss,
        "images": result.images,
        "images-per-second": result.images_per_second,
    }
    content = RecordDict(
        {ARRAYS: pack_state(site.model.state_dict()), METRICS: MetricRecord(metrics)}
    )
    return Message(content, reply_to=message)


def evaluate_reply(identity: Identity, message: Message) -> Message:
    """Answer an evaluation message: the loss of the held-out images, same views every round."""
    site, _, rows = _prepare(identity, message)
    loss, health = local_loss(
        site.model,
        site.pixels,
        rows,
        site.views_of(message),
        batch_size=site.config.train.batch_size,
        temperature=site.config.train.temperature,
        generator=generator_for(site.config.seed, "evaluate", identity.partition),
        device=site.device,
        dtype=site.dtype,
    )
    metrics = {"partition-id": identity.partition, "num-examples": len(rows), "eval-loss": loss}
    metrics |= health
    return Message(RecordDict({METRICS: MetricRecord(metrics)}), reply_to=message)
