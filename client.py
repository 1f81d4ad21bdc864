"""The ClientApp: who a client is, what it keeps, and its answers to messages."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from flwr.app import Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.clientapp.typing import Mod
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from fedssl.compute import choose_device, choose_dtype, release_memory
from fedssl.data.cache import open_image_set
from fedssl.data.image_set import Images
from fedssl.data.partitions import open_partitions, split_held_out
from fedssl.data.sources.folder import own_folder
from fedssl.data.views import Augmentation, make_augmentation
from fedssl.errors import UserError
from fedssl.federation.messages import pack_state, unpack_state
from fedssl.networks.state import load_state
from fedssl.seeding import derive_seed, generator_for
from fedssl.training.local import hold_images, local_loss, local_train
from fedssl.training.optimizers import make_optimization
from fedssl.training.schedule import plan_round, view_size
from model import SimCLR
from utils import build_model, open_source

ARRAYS, CONFIG, METRICS = "arrays", "config", "metrics"


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
    finally:
        release_memory()


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
    pixels: np.ndarray | Tensor
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
        hold_images(train.pixels, device),
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
    places = (config.dataset.image_size, config.cache_dir, config.seed)
    if data_path is None:
        source = open_source(config.dataset)
        if not source.is_here:
            raise UserError('this node has no images; put data-path="DIR" into its --node-config')
        image_set = open_image_set(source, *places, verify=verify)
        dealt = (
            num_partitions,
            OmegaConf.to_container(config.partition, resolve=True),
            config.seed,
        )
        return image_set.train, open_partitions(image_set, config.cache_dir, *dealt)
    folder = own_folder(data_path, config.dataset.name)
    try:
        train = open_image_set(folder, *places, verify=verify).train
    except UserError as error:
        raise UserError(str(error).replace("dataset.path", "data-path")) from error
    order = np.random.default_rng(derive_seed(config.seed, "partition"))
    return train, [order.permutation(len(train.pixels))]


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
    length, run_part = plan_round(site.config.train, round_number, num_rounds)
    result = local_train(
        site.model,
        site.pixels,
        rows,
        site.views_of(message),
        make_optimization(site.config.train),
        length=length,
        run_part=run_part,
        proximal_mu=float(request.get("proximal-mu", 0.0)),
        generator=generator_for(site.config.seed, "train", round_number, identity.partition),
        device=site.device,
        dtype=site.dtype,
    )
    release_memory()  # before the weights are copied into the reply
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
