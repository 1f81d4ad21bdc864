"""The ClientApp: who a client is, what it keeps, and its answers to messages."""

import functools
import logging
import re
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from flwr.app import Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.clientapp.mod import fixedclipping_mod
from flwr.clientapp.typing import ClientAppCallable, Mod
from flwr.supercore.differential_privacy import KEY_CLIPPING_NORM
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from fedssl.compute import Backend, choose_backend, release_memory, share_cores
from fedssl.data.image_set import ImageSet
from fedssl.data.partitions import split_held_out
from fedssl.data.views import Augmentation
from fedssl.errors import UserError, name_some
from fedssl.federation.keeping import LEFT, Keeping, folder_at_node, folder_of
from fedssl.federation.messages import (
    ARRAYS,
    CONFIG,
    METRICS,
    RUN,
    pack_rounded,
    packed_transport,
    read_array_record,
    read_state,
    write_state,
    write_tensors,
)
from fedssl.federation.negatives import NEGATIVES, others
from fedssl.federation.secure.client import (
    KEYS,
    SHARES,
    UNMASK,
    Signing,
    answer_keys,
    answer_shares,
    answer_unmask,
    is_masked,
    mask_update,
)
from fedssl.federation.statistics import ACTION
from fedssl.federation.wire import Wire, encode_update
from fedssl.methods.base import Method, local_arrays
from fedssl.networks.state import load_state
from fedssl.seeding import generator_for
from fedssl.sites.answers import ACTION as LABELS_ACTION
from fedssl.sites.answers import LabelledPart, answer_labels
from fedssl.sites.site import TuneSettings
from fedssl.training.local import (
    Pixels,
    TrainSettings,
    cache_on_device,
    local_loss,
    local_train,
    projection_moments,
)
from fedssl.training.optimizers import split_momentum
from fedssl.training.receiving import Receiving, Replace
from fedssl.training.schedule import Schedule
from fedssl.training.statistics import measure_moments
from utils import (
    build_method,
    build_receiving,
    build_schedule,
    build_train_settings,
    build_views,
    check_enough,
    open_client_images,
    open_labelled_part,
    read_config,
)

Metrics = dict[str, int | float | list[int] | list[float]]  # as Flower has them
OWN, MEMORY = "own:", "memory:"  # before names of what `Receiving` needs, among what is kept
RUN_NAME = re.compile("[0-9a-f]{8,64}")
SEE_LOG = "see the node's log"
log = logging.getLogger("flwr")  # at a node, what the node's command shows


@dataclass(frozen=True)
class ClientConfig:
    """Who a client is.

    Attributes:
        config_text: the run's configuration as YAML.
        partition: which of `num_partitions` parts of the data set it holds.
        data_path: its own folder of images instead; training looks for no labels.
        labels_path: its own class folders, for evaluations; None for those of data_path.
        standalone: at a node of its own: nobody else has opened and checked its images
            before, and names of its files stay there.
        kept_in: folder of what clients keep of this run; None at a node, which has its own.
        signing: of the keys of secure aggregation.
    """

    config_text: str
    partition: int
    num_partitions: int
    data_path: str | None = None
    labels_path: str | None = None
    standalone: bool = True
    kept_in: str | None = None
    signing: Signing = field(default_factory=Signing)


@dataclass
class ClientState:
    """What a client process keeps between messages, for all its clients: images, one model.

    Attributes:
        pixels: uint8 (N, 3, S, S), of all partitions.
        partitions: the rows of each.
        held_out: share of a client's images that are kept for its evaluation.
        first_local: the method's arrays that never travel, as a client begins.
        receiving: how it takes the global model to train on.
        cache: this machine's folder, where a node keeps what never travels.
        keep_rounds: checkpoints that a run keeps.
        unreadable: names of files that could not be decoded.
    """

    pixels: Pixels
    partitions: Sequence[np.ndarray]
    method: Method
    backend: Backend
    views: Augmentation
    schedule: Schedule
    settings: TrainSettings
    seed: int
    held_out: float
    first_local: Mapping[str, Tensor] = field(default_factory=dict)
    receiving: Receiving = field(default_factory=Replace)
    cache: Path | None = None
    keep_rounds: int = 1
    unreadable: Sequence[str] = ()

    @property
    def keeps(self) -> bool:
        """Whether a client keeps anything from round to round."""
        return bool(self.first_local) or self.receiving.remembers

    def views_of(self, round_number: int) -> Augmentation:
        """Give the views of a round; their size may grow over the rounds."""
        return replace(self.views, output_size=self.schedule.train_resolution(round_number))

    def rows_of(self, client: ClientConfig) -> tuple[np.ndarray, np.ndarray]:
        """Give a client's rows to train on and to hold out."""
        rows = self.partitions[0 if client.data_path else client.partition]
        return split_held_out(rows, self.held_out)


@functools.lru_cache(maxsize=1)
def load_client(config_text: str, num_partitions: int, data_path: str | None) -> ClientState:
    """Open the images and build the model once per process, for all its clients."""
    config = read_config(config_text)
    if config.num_cpus:
        torch.set_num_threads(config.num_cpus)
    backend = choose_backend(config.precision, config.num_gpus)
    image_set, partitions = open_client_images(config, num_partitions, data_path)
    if image_set.fresh:
        tell_unreadable(image_set)
    method = build_method(config, backend.device)
    return ClientState(
        cache_on_device(image_set.train.pixels, backend.device),
        partitions,
        method,
        backend,
        build_views(config),
        build_schedule(config),
        build_train_settings(config),
        config.seed,
        config.held_out,
        local_arrays(method),
        build_receiving(config, method),
        Path(config.cache_dir).expanduser(),
        config.keep_checkpoints,
        image_set.unreadable,
    )


def tell_unreadable(image_set: ImageSet) -> None:
    """Name the files that could not be decoded in the log of this process, once."""
    if names := tuple(image_set.unreadable):
        total = len(names) + len(image_set.train.pixels)
        _warn(names, total + (len(image_set.test.pixels) if image_set.test else 0))


@functools.lru_cache
def _warn(names: tuple[str, ...], total: int) -> None:
    told = name_some(list(names))
    log.warning("%d of %d images can't be read and are left out: %s", len(names), total, told)


def take_cores(client: ClientConfig) -> None:
    """Take a node's share of this machine's cores, unless the run says how many."""
    if not read_config(client.config_text).num_cpus:
        share = share_cores()
        torch.set_num_threads(share.cores)
        log.info("partition %d %s", client.partition, share)


Identify = Callable[[Context], ClientConfig]
Load = Callable[[ClientConfig], ClientState]


def load_cached(client: ClientConfig) -> ClientState:
    """Give what this process keeps for a client and its like."""
    return load_client(client.config_text, client.num_partitions, client.data_path)


def simulated(config: DictConfig, kept_in: Path | None = None) -> Identify:
    """Identify virtual clients: Flower numbers their partitions itself.

    Args:
        kept_in: folder of what clients keep from round to round; None for no files.
    """
    text = OmegaConf.to_yaml(config, resolve=True)

    def identify(context: Context) -> ClientConfig:
        node = context.node_config
        number, count = int(node["partition-id"]), int(node["num-partitions"])
        folder = None if kept_in is None else str(kept_in)
        return ClientConfig(text, number, count, standalone=False, kept_in=folder)

    return identify


def make_client_app(
    identify: Identify, mods: Sequence[Mod] = (), load: Load = load_cached
) -> ClientApp:
    """Build the ClientApp: the same for a simulated client and for a SuperNode.

    Args:
        identify: tells from a message's context who the client is.
        mods: of Flower, such as those for differential privacy, around the training;
            they see plain arrays, those that the strategy acts on, on the way in and out.
        load: gives what the client works with.
    """
    app = ClientApp(mods=[explain_errors(identify), packed_transport])
    around = [round_if_asked(identify, load), mask_if_asked(identify), clip_if_asked, *mods]
    for register, answer in (
        (app.train(mods=around), train_reply),
        (app.evaluate(), evaluate_reply),
        (app.query(), query_reply),
        (app.query(ACTION), statistics_reply),
        (app.query(KEYS), keys_reply),
        (app.query(LABELS_ACTION), labels_reply),
    ):
        register(functools.partial(_answer, identify, load, answer))
    app.query(SHARES)(lambda message, context: shares_reply(identify(context), message, context))
    app.query(UNMASK)(answer_unmask)
    return app


def round_if_asked(identify: Identify, load: Load) -> Mod:
    """Make the mod around all others of a training, which rounds its update if asked to."""

    def mod(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
        client = identify(context)
        wire: Wire = settings_of(client.config_text).wire
        if wire == "float32":
            return call_next(message, context)
        start = read_array_record(message.content)
        reply = call_next(message, context)
        if reply.has_error():
            return reply
        left = open_left(client, load(client), message, context)
        earlier = left.read(round_of(message) - 1)
        coded, rest = encode_update(start, read_array_record(reply.content), earlier, wire)
        left.write(round_of(message), rest)
        reply.content[ARRAYS] = pack_rounded(coded)
        return reply

    return mod


def mask_if_asked(identify: Identify) -> Mod:
    """Make the mod that masks an update where the run's settings say so, after it was clipped."""

    def mod(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
        if is_masked(message):
            return mask_update(message, context, call_next)
        if settings_of(identify(context).config_text).secure_aggregation:
            raise ValueError("the server asks for an update without a mask")
        return call_next(message, context)

    return mod


@functools.lru_cache(maxsize=1)
def settings_of(config_text: str) -> DictConfig:
    """Read a run's configuration once per process; nobody changes it."""
    return read_config(config_text)


def clip_if_asked(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
    """Clip the update where the server wants it, by Flower's mod, before a mask is put on."""
    if KEY_CLIPPING_NORM in message.content.config_records[CONFIG]:
        return fixedclipping_mod(message, context, call_next)
    return call_next(message, context)


Answer = Callable[[ClientConfig, ClientState, Message, Context], Message]


def _answer(
    identify: Identify, load: Load, answer: Answer, message: Message, context: Context
) -> Message:
    client = identify(context)
    if client.standalone:
        take_cores(client)
    try:
        return answer(client, load(client), message, context)
    finally:
        release_memory()


def explain_errors(identify: Identify) -> Mod:
    """Make the mod around all others: it says of an error whose it is and what of it travels.

    Flower's error replies carry the text of an exception, and nothing of whose it is. Of an
    error at a node of its own they carry no more than `public_text`; all of it goes into the
    node's log.
    """

    def mod(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
        who, standalone = "", True
        try:
            client = identify(context)
            who, standalone = f"partition {client.partition}: ", client.standalone
            return call_next(message, context)
        except Exception as error:
            if not standalone:
                raise RuntimeError(f"{who}{error}") from error
            known = isinstance(error, UserError)
            log.error("%s%s", who, error if known else traceback.format_exc().rstrip())
            raise RuntimeError(f"{who}{public_text(error)}") from None

    return mod


def public_text(error: Exception) -> str:
    """Say of an error what may leave a node: never the name of a file or folder.

    A UserError says itself what is public; the loss of a training is; of all others it is
    the type.
    """
    if isinstance(error, FloatingPointError):
        return str(error)
    if not isinstance(error, UserError):
        return f"{type(error).__name__}; {SEE_LOG}"
    if error.public is None:
        return f"a setting does not suit it; {SEE_LOG}"
    return error.public if error.public == str(error) else f"{error.public}; {SEE_LOG}"


def query_reply(
    client: ClientConfig, state: ClientState, message: Message, context: Context
) -> Message:
    """Answer which partition this client holds, once its images are open, intact and enough."""
    if client.standalone:
        config = read_config(client.config_text)
        opened = open_client_images(config, client.num_partitions, client.data_path, verify=True)
        tell_unreadable(opened[0])
    train, _ = state.rows_of(client)
    check_enough(state.method, len(train), client.partition)
    metrics = MetricRecord({"partition-id": client.partition})
    return Message(RecordDict({METRICS: metrics}), reply_to=message)


def train_reply(
    client: ClientConfig, state: ClientState, message: Message, context: Context
) -> Message:
    """Answer a training message: the weights after a round of local training."""
    keeping = open_keeping(client, state, message, context)
    momentum, memory = _load_to_train(state, message, keeping)
    request = message.content.config_records[CONFIG]
    round_number = round_of(message)
    rows, _ = state.rows_of(client)
    result = local_train(
        state.method,
        state.pixels,
        rows,
        state.views_of(round_number),
        state.settings,
        plan=state.schedule.plan(round_number),
        proximal_mu=float(str(request.get("proximal-mu", 0.0))),
        generator=generator_for(state.seed, "train", round_number, client.partition),
        backend=state.backend,
        momentum=momentum,
        negatives=others(request.get(NEGATIVES), client.partition),
    )
    release_memory()  # before the weights are copied into the reply
    if keeping:
        keeping.write(round_number, _to_keep(state, memory))
    metrics: Metrics = {
        "partition-id": client.partition,
        "num-examples": len(rows),
        "train-loss": result.loss,
        "images": result.images,
        "images-per-second": result.images_per_second,
        "cores": torch.get_num_threads(),
        "unreadable-images": len(state.unreadable) if client.standalone else 0,
    }
    trained = {**state.method.shared_state(), **result.momentum}
    content = write_state(trained, list(message.content[ARRAYS]))
    content[METRICS] = MetricRecord(metrics)
    return Message(content, reply_to=message)


def keys_reply(
    client: ClientConfig, state: ClientState, message: Message, context: Context
) -> Message:
    """Answer the first step of secure aggregation: public keys, and how many images there are."""
    rows, _ = state.rows_of(client)
    return answer_keys(message, context, client.partition, len(rows), client.signing)


def shares_reply(client: ClientConfig, message: Message, context: Context) -> Message:
    """Answer the second step of secure aggregation: shares of the round's secrets."""
    return answer_shares(message, context, client.signing)


def evaluate_reply(
    client: ClientConfig, state: ClientState, message: Message, context: Context
) -> Message:
    """Answer an evaluation message: the loss of the held-out images, same views every round."""
    _load_to_measure(state, message, open_keeping(client, state, message, context))
    round_number = round_of(message)
    own, rows = state.rows_of(client)
    loss, representation = local_loss(
        state.method,
        state.pixels,
        rows,
        state.views_of(round_number),
        batch_size=state.settings.batch_size,
        generator=generator_for(state.seed, "evaluate", client.partition),
        backend=state.backend,
    )
    metrics: Metrics = {"partition-id": client.partition, "num-examples": len(rows)}
    metrics |= {"eval-loss": loss, **representation}
    content = RecordDict({METRICS: MetricRecord(metrics)})
    if state.method.shares_projections:
        moments = projection_moments(
            state.method,
            state.pixels,
            own,
            state.views_of(round_number),
            batch_size=state.settings.batch_size,
            generator=generator_for(state.seed, "projections", round_number, client.partition),
            backend=state.backend,
        )
        content = RecordDict({**content, **write_tensors(moments)})
    return Message(content, reply_to=message)


def statistics_reply(
    client: ClientConfig, state: ClientState, message: Message, context: Context
) -> Message:
    """Answer what enters the BatchNorm layers: mean and mean square over this client's images."""
    _load_to_measure(state, message, open_keeping(client, state, message, context))
    round_number = round_of(message)
    rows, _ = state.rows_of(client)
    moments = measure_moments(
        state.method,
        state.pixels,
        rows,
        state.views_of(round_number),
        state.schedule.eval_resolution(round_number),
        batch_size=state.settings.batch_size,
        generator=generator_for(state.seed, "statistics", client.partition),
        backend=state.backend,
    )
    metrics = MetricRecord({"partition-id": client.partition, "num-examples": len(rows)})
    return Message(RecordDict({METRICS: metrics, **write_tensors(moments)}), reply_to=message)


def labels_reply(
    client: ClientConfig, state: ClientState, message: Message, context: Context
) -> Message:
    """Answer a step of the evaluation at the sites, see fedssl/sites/answers.py."""

    def encode(encoder: Mapping[str, Tensor], pixels: np.ndarray) -> np.ndarray:
        from fedssl.evaluation.features import extract_features  # training needs no evaluation

        load_state(state.method.encoder, encoder)
        resolution = state.schedule.eval_resolution(round_of(message))
        size = state.settings.batch_size
        return extract_features(state.method.encoder, pixels, state.backend, size, resolution)

    def tune(
        network_state: Mapping[str, Tensor],
        pixels: np.ndarray,
        labels: np.ndarray,
        settings: TuneSettings,
        seed: int,
        tune_round: int,
    ) -> Mapping[str, Tensor]:
        from fedssl.sites.tuning import Classifying, tune_at_site, tune_generator

        classes = len(network_state["head.bias"])
        network = Classifying(state.method.encoder, classes)
        load_state(network, network_state)
        resolution = state.schedule.eval_resolution(round_of(message))
        views = replace(state.views, output_size=resolution)
        generator = tune_generator(seed, tune_round, client.partition)
        given = pixels, labels, settings, tune_round, views, state.backend, generator
        tune_at_site(network, *given)
        return {name: value.cpu() for name, value in network.state_dict().items()}

    def open_part() -> LabelledPart:
        folder = client.labels_path or client.data_path
        return open_labelled(client.config_text, client.partition, client.num_partitions, folder)

    content = answer_labels(message, context, client.partition, open_part, encode, tune)
    return Message(content, reply_to=message)


@functools.lru_cache(maxsize=1)
def open_labelled(
    config_text: str, partition: int, num_partitions: int, folder: str | None
) -> LabelledPart:
    """Open a site's labelled images once per process."""
    return open_labelled_part(read_config(config_text), partition, num_partitions, folder)


def round_of(message: Message) -> int:
    """Read the number of a message's round."""
    return int(str(message.content.config_records[CONFIG]["server-round"]))


def open_keeping(
    client: ClientConfig, state: ClientState, message: Message, context: Context
) -> Keeping | None:
    """Find what a client keeps from round to round; None for a method that keeps nothing.

    Raises:
        ValueError: the message names its run in another way than a server does.
    """
    if not state.keeps:
        return None
    return Keeping(context, own_place(client, state, message), state.keep_rounds)


def open_left(
    client: ClientConfig, state: ClientState, message: Message, context: Context
) -> Keeping:
    """Find what rounding has left of a client's updates.

    Raises:
        ValueError: as of `own_place`.
    """
    own = own_place(client, state, message)
    return Keeping(context, own and own / LEFT, state.keep_rounds, LEFT)


def own_place(client: ClientConfig, state: ClientState, message: Message) -> Path | None:
    """Give the folder of what a client keeps of this run; None for no files.

    Raises:
        ValueError: the message names its run in another way than a server does.
    """
    folder = Path(client.kept_in) if client.kept_in else None
    if client.standalone and state.cache:
        run = str(message.content.config_records[CONFIG].get(RUN, ""))
        if not RUN_NAME.fullmatch(run):
            raise ValueError("the message does not say of which run it is")
        folder = folder_at_node(state.cache, run)
    return None if folder is None else folder_of(folder, client.partition)


def _load_to_train(
    state: ClientState, message: Message, keeping: Keeping | None
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Load what a training message brings, and beside it what the client keeps of its own.

    Returns:
        The momentum that the message brings, if any, and the memory of `Receiving`.
    """
    kept = keeping.read(round_of(message) - 1) if keeping else {}
    shared, momentum = split_momentum(read_state(message.content))
    memory = _take(kept, MEMORY)
    if own := _take(kept, OWN):
        shared = state.receiving.receive(shared, own, memory)
    _load(state, shared, kept)
    return momentum, memory


def _load_to_measure(state: ClientState, message: Message, keeping: Keeping | None) -> None:
    """Load the global model as it is, and beside it the arrays that never travel."""
    kept = keeping.read(round_of(message)) if keeping else {}
    _load(state, split_momentum(read_state(message.content))[0], kept)


def _load(state: ClientState, shared: Mapping[str, Tensor], kept: Mapping[str, Tensor]) -> None:
    local = {name: kept.get(name, first) for name, first in state.first_local.items()}
    load_state(state.method, {**shared, **local})
    if not kept:
        state.method.begin_locally()


def _to_keep(state: ClientState, memory: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Gather what a client needs in its next round and nobody else does."""
    own = state.method.shared_state() if state.receiving.remembers else {}
    kept = {f"{OWN}{name}": value.cpu() for name, value in own.items()}
    kept |= {f"{MEMORY}{name}": value for name, value in memory.items()}
    return {**{n: v.cpu() for n, v in local_arrays(state.method).items()}, **kept}


def _take(kept: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {n.removeprefix(prefix): v for n, v in kept.items() if n.startswith(prefix)}
