"""From configuration to objects: what every process prepares alike.

The only place that reads sections of the configuration; what lies below takes values.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, Any, TypeVar, cast

import numpy as np
import torch
from flwr.serverapp import Grid
from hydra.errors import InstantiationException
from hydra.utils import get_class, instantiate
from omegaconf import DictConfig, OmegaConf

from fedssl.compute import Backend, choose_backend
from fedssl.config.compose import flatten
from fedssl.config.roster import read_roster
from fedssl.data import partitions
from fedssl.data.cache import Report, open_image_set
from fedssl.data.image_set import ImageSet
from fedssl.data.sources.base import NO_LABEL, Source, absolute
from fedssl.data.sources.folder import labelled_folder, own_folder
from fedssl.data.views import Augmentation, make_augmentation
from fedssl.errors import WARNING, SettingError, UserError
from fedssl.federation.aggregation import build_strategy, fraction_train
from fedssl.federation.membership import Membership, Patience
from fedssl.federation.nodes import Nodes, no_op
from fedssl.federation.privacy import PrivacySettings, make_private
from fedssl.federation.resources import (
    ClientResources,
    clients_per_round,
    find_machines,
    plan_resources,
)
from fedssl.federation.rounds import Federation, OnRound, ProgressCallback, RoundSettings
from fedssl.federation.secure.server import SecureSettings
from fedssl.federation.statistics import whole_statistics
from fedssl.federation.weights import Weighting
from fedssl.files import writing_to
from fedssl.methods.base import Method
from fedssl.networks.encoder import Encoder, EncoderSettings, stem_for
from fedssl.networks.state import load_state
from fedssl.runs.checkpoints import Checkpoint, load_checkpoint
from fedssl.runs.directory import RunDirectory
from fedssl.runs.encoder_file import Classifier
from fedssl.runs.metrics import NOT_COVERED, RoundMetrics
from fedssl.runs.resume import Continuation, check_same, reopen
from fedssl.seeding import derive_seed, draw_seed
from fedssl.training.local import TrainSettings
from fedssl.training.optimizers import OptimizerSettings, zero_momentum
from fedssl.training.receiving import Receiving
from fedssl.training.schedule import Schedule

if TYPE_CHECKING:  # a client, which imports this file for every message, evaluates nothing
    from fedssl.evaluation.base import Evaluation, EvaluationData
    from fedssl.reporting.sections import RunFacts, RunImages
    from fedssl.runs.results import Result
    from fedssl.sites.answers import LabelledPart

Built = TypeVar("Built")
PREPARATION = (
    "image_size",
    "mean",
    "std",
)  # keys of the `dataset` section that aren't the source's


def plain(section: DictConfig) -> Any:
    """Give a section as plain Python, its interpolations resolved."""
    return OmegaConf.to_container(section, resolve=True)


def read_config(text: str) -> DictConfig:
    """Read a configuration that travelled as YAML."""
    config = OmegaConf.create(text)
    assert isinstance(config, DictConfig)
    return config


def select(kind: type[Built], section: DictConfig) -> Built:
    """Build an object from those values of a section that its fields are named by."""
    return kind(**{field.name: section[field.name] for field in fields(kind)})  # type: ignore[arg-type]


def name_of(section: DictConfig) -> str:
    """Name the class that a section builds, without its modules."""
    return str(section._target_).rpartition(".")[2]


# --- images --------------------------------------------------------------------


def name_of_images(section: DictConfig) -> str:
    """Name a data set for people and files."""
    return open_source(section).title


def title_of_images(section: DictConfig) -> str:
    """Name a data set for people; a folder, and what has no name, by the folder's name, too."""
    has_own = name_of(section) == "FolderSource" or section.name is None
    path = section.path if has_own else None
    folder = absolute(path).name if path else None
    return " ".join(filter(None, [name_of_images(section), folder]))


def open_source(section: Mapping[str, Any]) -> Source:
    """Make the source of images that the `dataset` section describes; opens no image yet.

    Raises:
        UserError: the section names no source, or does not suit it.
    """
    arguments = {key: value for key, value in section.items() if key not in PREPARATION}
    try:
        source = instantiate(arguments)
    except InstantiationException as error:
        reason = str(error.__cause__ or error).splitlines()[0]
        raise UserError(f"dataset: {reason}") from error
    if not isinstance(source, Source):
        raise UserError(f"dataset._target_={arguments.get('_target_')}: no source of images")
    return source


def open_images(config: DictConfig, report: Report = no_op, verify: bool = True) -> ImageSet:
    """Open the images of a run, decoding them into the cache the first time.

    Raises:
        UserError: as `open_image_set`.
    """
    place = config.dataset.image_size, config.cache_dir, config.seed
    return open_image_set(open_source(config.dataset), *place, report, verify)


def open_partitions(
    config: DictConfig, image_set: ImageSet, num_partitions: int | None = None
) -> list[np.ndarray]:
    """Deal the training images out: the rows of each partition, as many as clients by default.

    Raises:
        UserError: as `partition_rows`.
    """
    count = num_partitions or config.num_clients
    spec = plain(config.partition)
    return partitions.open_partitions(image_set, config.cache_dir, count, spec, config.seed)


def open_client_images(
    config: DictConfig, num_partitions: int, data_path: str | None, verify: bool = False
) -> tuple[ImageSet, list[np.ndarray]]:
    """Open a node's own folder, all of it, or the data set that is dealt out to all.

    Raises:
        UserError: no images, or not enough.
    """
    if data_path is None:
        if not open_source(config.dataset).is_here:
            raise SettingError(
                'this node has no images; put data-path="DIR" into its --node-config'
            )
        image_set = open_images(config, verify=verify)
        return image_set, open_partitions(config, image_set, num_partitions)
    folder = own_folder(data_path, config.dataset.name)
    place = config.dataset.image_size, config.cache_dir, config.seed
    try:
        image_set = open_image_set(folder, *place, verify=verify)
    except UserError as error:
        line = str(error).replace("dataset.path", "data-path")
        raise UserError(line, public=error.public) from error
    order = np.random.default_rng(derive_seed(config.seed, "partition"))
    return image_set, [order.permutation(len(image_set.train.pixels))]


def open_labelled_part(
    config: DictConfig, number: int, num_partitions: int, folder: str | None
) -> "LabelledPart":
    """Open a site's labelled images: a folder of its own, or its part of the data set.

    Args:
        number: of the partition.
        folder: with class folders; None for the data set that is dealt out to all.

    Raises:
        UserError: no images.
    """
    from fedssl.sites.answers import LabelledPart
    from fedssl.sites.site import deal_like

    place = config.dataset.image_size, config.cache_dir, config.seed
    image_set = (
        open_image_set(labelled_folder(folder, config.dataset.name), *place)
        if folder
        else open_images(config)
    )
    train, test = image_set.train, image_set.test
    none = np.array([], dtype=np.int64)
    labels = np.full(len(train.pixels), NO_LABEL) if train.labels is None else train.labels
    if test is None or test.labels is None:
        test_pixels, test_labels = train.pixels[:0], none
    else:
        test_pixels, test_labels = test.pixels, test.labels
    rows, test_rows = np.arange(len(labels)), np.arange(len(test_labels))
    if not folder:
        parts = open_partitions(config, image_set, num_partitions)
        rows = parts[number]
        test_rows = deal_like(parts, labels, test_labels, draw_seed(config.seed, 0))[number]
    given = train.pixels, labels, rows, test_pixels, test_labels, test_rows
    return LabelledPart(*given, image_set.class_names)


def build_views(config: DictConfig, output_size: int | None = None) -> Augmentation:
    """Build the random views, of the images' size by default."""
    return make_augmentation(plain(config.augment), output_size or config.dataset.image_size)


# --- model and training ----------------------------------------------------------


def build_method(config: DictConfig, device: torch.device) -> Method:
    """Build the method of a run at the initialization that the seed gives.

    Raises:
        UserError: the method refuses its settings.
    """
    dataset, stem = config.dataset, config.model.stem
    stem = stem_for(dataset.image_size) if stem == "auto" else stem
    statistics = list(dataset.mean), list(dataset.std)
    settings = EncoderSettings(config.model.encoder, stem, *statistics, config.model.norm)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        try:
            method: Method = instantiate(plain(config.method), encoder=Encoder(settings))
        except InstantiationException as error:
            reason = str(error.__cause__ or error).splitlines()[0]
            raise SettingError(f"method: {reason}") from error
    return method.to(device).to(memory_format=torch.channels_last)


def check_enough(method: Method, num_images: int, partition: int) -> None:
    """Make sure that a client has the images that a method needs.

    Args:
        num_images: to train on.

    Raises:
        UserError: it has too few.
    """
    if num_images < method.least_images:
        raise SettingError(
            f"{method.least_images_key}={method.least_images}: partition {partition} has only "
            f"{num_images} images to train on; give at most that, or deal out to fewer clients"
        )


def build_receiving(config: DictConfig, method: Method) -> Receiving:
    """Build how clients take the global model.

    Raises:
        UserError: it does not suit the method.
    """
    receiving: Receiving = instantiate(plain(config.receive))
    try:
        receiving.check(method)
    except ValueError as error:
        raise SettingError(f"receive: {name_of(config.receive)} asks for more; {error}") from error
    return receiving


def build_schedule(config: DictConfig) -> Schedule:
    """Build the plan of what changes over the rounds."""
    train = config.train
    return Schedule(
        config.num_rounds,
        config.dataset.image_size,
        tuple(train.train_resolutions),
        train.eval_resolution,
        tuple(train.round_fractions),
    )


def build_train_settings(config: DictConfig) -> TrainSettings:
    """Build how a client trains in a round."""
    train, optimizer = config.train, OptimizerSettings(**plain(config.optimizer))
    return TrainSettings(
        train.local_epochs,
        train.batch_size,
        train.max_steps,
        optimizer,
        train.global_statistics_from,
    )


def load_trained(config: DictConfig, checkpoint: Path, device: torch.device) -> tuple[Method, int]:
    """Load a checkpoint of a run; return the method and its round.

    Raises:
        UserError: a damaged checkpoint, or one of another architecture.
    """
    method = build_method(config, device)
    loaded = load_checkpoint(checkpoint)
    try:
        load_state(method, {**loaded.state, **whole_statistics(loaded.beside)})
    except ValueError as error:
        raise UserError(
            f"checkpoint={checkpoint}: of another architecture than {config.model.encoder} "
            f"with stem {method.encoder.settings.stem} ({error}); evaluate it with its own run"
        ) from error
    return method, loaded.round


# --- federation ------------------------------------------------------------------


def plan_simulation(config: DictConfig) -> ClientResources:
    """Share the machines among the clients that train at a time.

    Raises:
        UserError: more is asked for than there is, the strategy can't be used, or nodes
            are named, which a simulation does not have.
    """
    if config.nodes_file is not None:
        raise UserError(
            f"nodes_file={config.nodes_file}: a simulation has no nodes; leave it out, or start "
            "flower-server-app"
        )
    share = fraction_train(build_strategy(plain(config.strategy)))
    sampled = clients_per_round(config.num_clients, share)
    machines = find_machines(config.ray_address)
    return plan_resources(sampled, config.num_cpus, config.num_gpus, machines)


def build_privacy(config: DictConfig) -> PrivacySettings | None:
    """Build what differential privacy asks for; None where none is asked for.

    Raises:
        UserError: a limit that allows no round, or noise that leaves nothing.
    """
    if config.privacy.mechanism == "none":
        return None
    count = len(config.participants) or config.num_clients
    share = fraction_train(build_strategy(plain(config.strategy)))
    planned = clients_per_round(count, share)
    counts = {"population": config.num_clients, "clients_per_round": planned}
    settings = PrivacySettings(**counts, **plain(config.privacy))
    settings.check()
    return settings


def build_patience(config: DictConfig) -> Patience:
    """Build how long to wait for clients; min_nodes=null means all of them."""
    least = config.min_nodes or config.num_clients
    return Patience(
        least,
        config.node_wait_s,
        config.round_timeout_s,
        frozenset(config.participants),
        config.num_clients,
    )


def open_membership(config: DictConfig) -> Membership:
    """Read which nodes may take part; without a file, any may.

    Raises:
        UserError: no such file, something else in it, or too few nodes.
    """
    if config.nodes_file is None:
        return Membership()
    roster = read_roster(Path(config.nodes_file).expanduser())
    given = f"nodes_file={config.nodes_file}: names {len(roster)} nodes"
    for key in ("num_clients", "min_nodes", "min_results"):
        if (config[key] or 0) > len(roster):
            raise UserError(f"{given}, {key}={config[key]}: add the others, or give a lower {key}")
    partitions = [member.partition for member in roster]
    for partition in config.participants:
        if partition not in partitions:
            raise UserError(f"{given}, of partitions {partitions}; participants has {partition}")
    return Membership(roster)


def build_federation(
    config: DictConfig,
    nodes: Nodes,
    run: RunDirectory,
    image_set: ImageSet | None,
    checkpoint: Checkpoint | None = None,
    noise_key: bytes | None = None,
) -> Federation:
    """Build the global model, the strategy and what watches them.

    Args:
        image_set: for the kNN accuracy per round; None, or a set without labels,
            leaves it out.
        checkpoint: of the last round that was done.
        noise_key: secret, of differential privacy; None takes the noise from the seed.
    """
    from fedssl.evaluation.monitor import KnnMonitor  # no client needs it

    backend = choose_backend(config.precision)
    privacy = build_privacy(config)
    settings = RoundSettings(
        seed=config.seed,
        num_rounds=config.num_rounds,
        last_round=privacy.rounds_within(config.num_rounds) if privacy else config.num_rounds,
        min_results=config.min_results,
        max_update_ratio=config.max_update_ratio or 0,
        weighting=Weighting(config.weighting, config.max_weight_ratio or 0),
        keep_checkpoints=config.keep_checkpoints,
        evaluate_every=config.evaluate_every,
        projection_size=config.method.get("projection_size", 0),
        secure=select(SecureSettings, config.secagg) if config.secure_aggregation else None,
        recompute_statistics=config.train.statistics == "recomputed",
        images=image_set.content if image_set else None,
    )
    monitor = None
    if image_set and image_set.train.labels is not None:
        limits = plain(config.monitor)
        schedule = build_schedule(config)
        monitor = KnnMonitor(
            image_set.train, config.seed, **limits, backend=backend, schedule=schedule
        )
    strategy, acts_on = build_strategy(plain(config.strategy)), config.strategy.acts_on
    key = noise_key or derive_seed(config.seed, "privacy").to_bytes(8, "big")
    strategy = make_private(strategy, privacy, key)
    method = build_method(config, backend.device)
    momentum = zero_momentum(method, build_train_settings(config).optimizer)
    return Federation(
        nodes, method, strategy, acts_on, settings, run, monitor, checkpoint, momentum
    )


def run_rounds(
    config: DictConfig,
    grid: Grid,
    run: RunDirectory,
    image_set: ImageSet | None,
    on_round: OnRound,
    *,
    checkpoint: Checkpoint | None = None,
    on_progress: ProgressCallback = no_op,
    report: Callable[[str], None] = no_op,
    stop: Event | None = None,
    membership: Membership | None = None,
    noise_key: bytes | None = None,
) -> str | None:
    """Run the rounds that are left, then write encoder and loss graph: main.py's and app.py's core.

    Args:
        on_round: called with the numbers of every finished round.
        on_progress: called as clients answer.
        report: told, in a line, of waiting and of nodes that come and go.
        stop: set by another thread to end all waiting.
        membership: decides who may take part; by default whoever comes first.
        noise_key: as of `build_federation`.

    Returns:
        Why it ended before the last round, if it did.

    Raises:
        RuntimeError: too few clients, or files can't be written.
    """
    from fedssl.reporting.figures import draw_loss_graph  # no client needs these two
    from fedssl.reporting.log import TensorboardWriter

    nodes = Nodes(grid, build_patience(config), report, stop, membership, config.wire)
    federation = build_federation(config, nodes, run, image_set, checkpoint, noise_key)
    with TensorboardWriter(run.path, purge_step=federation.done + 1) as events:

        def keep(metrics: RoundMetrics) -> None:
            events.write(metrics)
            on_round(metrics)

        ended = federation.train(keep, on_progress)
    encoder, done = federation.encoder(), federation.done
    resolution = build_schedule(config).eval_resolution(done)
    title = f"{name_of(config.method)} on {name_of_images(config.dataset)}"
    file, loss_name = run.path / "loss_graph.png", federation.method.loss_name
    with writing_to(run.path):
        run.save_encoder(encoder, resolution, name_of_images(config.dataset), done)
        draw_loss_graph(run.read_metrics(), file, title, loss_name)
    return ended


# --- runs --------------------------------------------------------------------------


def continuation_of(config: DictConfig, image_set: ImageSet | None) -> Continuation:
    """Say with what `resume` is to go on."""
    images = image_set.content if image_set else None
    return Continuation(config.resume, config.output_dir, config.num_rounds, plain(config), images)


def open_run(
    config: DictConfig,
    directory: Path,
    image_set: ImageSet | None,
    overrides: Sequence[str],
    report: Report,
) -> tuple[RunDirectory, Checkpoint | None]:
    """Start a run's directory, or go back to where `resume` left off.

    Args:
        directory: of a new run.
        overrides: that led to the configuration.

    Raises:
        UserError: as `reopen`.
    """
    if config.resume is not None:
        return reopen(continuation_of(config, image_set), overrides, report)
    return RunDirectory.create(directory, plain(config), config.output_dir, overrides), None


# --- evaluation and report -----------------------------------------------------------


def open_evaluation(
    settings: DictConfig,
    config: DictConfig,
    image_set: ImageSet,
    round_number: int,
    backend: Backend,
) -> tuple["Evaluation", "EvaluationData"]:
    """Build a protocol and draw the labels that it gives.

    Args:
        settings: the `eval` section, or those of test.py, which have its keys at the top.
        config: of the run that trained the encoder.
        round_number: of the checkpoint, which decides the size of the images.

    Raises:
        UserError: no labels, or too few.
    """
    from fedssl.evaluation.base import EvaluationData

    kind: type[Evaluation] = get_class(settings._target_)
    evaluation = select(kind, settings)
    resolution = build_schedule(config).eval_resolution(round_number)
    dealt = open_partitions(config, image_set) if evaluation.needs_partitions else []
    data = EvaluationData.of(
        image_set,
        label_fraction=evaluation.label_fraction,
        num_seeds=evaluation.seeds,
        seed=config.seed,
        resolution=resolution,
        views=build_views(config, resolution),
        backend=backend,
        feature_batch_size=evaluation.feature_batch_size,
        partitions=dealt,
    )
    return evaluation, data


def evaluate_run(
    run: RunDirectory,
    config: DictConfig,
    settings: DictConfig,
    image_set: ImageSet,
    checkpoint: Path,
) -> "Result":
    """Evaluate a checkpoint, if asked beside a random encoder and the raw pixels; record it.

    Raises:
        UserError: no labels, or a checkpoint of another architecture.
        RuntimeError: files can't be written.
    """
    from fedssl.evaluation.protocol import evaluate
    from fedssl.runs.provenance import provenance
    from fedssl.runs.results import Result

    backend = choose_backend(config.precision)
    method, round_number = load_trained(config, checkpoint, backend.device)
    evaluation, data = open_evaluation(settings, config, image_set, round_number, backend)
    untrained = build_method(config, backend.device).encoder
    result = Result(
        mode=evaluation.mode,
        dataset=title_of_images(config.dataset),
        protocol=evaluation.protocol(),
        round=round_number,
        labelled_images=evaluation.count_labelled(data),
        test_images=len(data.test.pixels),
        rows=evaluate(evaluation, method.encoder, untrained, data, name_of(config.method)),
        seed=config.seed,
        checkpoint=checkpoint.name,
        precision=str(backend.dtype).removeprefix("torch."),
        measured=provenance(),
        images=image_set.content,
        privacy=spent_privacy(run, config, round_number),
        own_images=load_checkpoint(checkpoint).images == image_set.content,
    )
    with writing_to(run.path):
        run.add_result(result.to_json())
        keep_classifier(run, config, method.encoder, result, image_set.class_names)
    return result


def spent_privacy(
    run: RunDirectory, config: DictConfig, round_number: int
) -> dict[str, Any] | None:
    """Tell what the encoder after a round may tell of a client; None without such a promise."""
    spent = next((m for m in run.read_metrics() if m.round == round_number), None)
    if spent is None or spent.epsilon is None:
        return None
    found = {"epsilon": spent.epsilon, "delta": spent.delta}
    return plain(config.privacy) | found | {"not_covered": list(NOT_COVERED)}


def keep_classifier(
    run: RunDirectory,
    config: DictConfig,
    encoder: Encoder,
    result: "Result",
    class_names: Sequence[str],
) -> None:
    """Write the first head of a result, if it has one, with its encoder into a file."""
    if (head := result.rows[0].head) is None:
        return
    if (tuned := result.rows[0].tuned) is not None:
        encoder = copy.deepcopy(encoder)
        load_state(encoder, tuned)
    weight, bias = (torch.from_numpy(np.ascontiguousarray(array.T)) for array in head)
    resolution = build_schedule(config).eval_resolution(result.round)
    classifier = Classifier(weight, bias, class_names[: len(bias)])
    name = name_of_images(config.dataset)
    run.save_classifier(encoder, resolution, name, result.round, classifier)


def evaluate_at_sites(
    config: DictConfig,
    grid: Grid,
    report: Callable[[str], None] = no_op,
    membership: Membership | None = None,
    stop: Event | None = None,
) -> "Result":
    """Evaluate the encoder of the run `config.run` where the labels are; record it.

    Args:
        report: told, in a line, of waiting, odd class names and sites that are left out.

    Raises:
        UserError: no such run, or one of another configuration.
        RuntimeError: too few nodes, or none with labels.
    """
    from fedssl.runs.provenance import provenance
    from fedssl.runs.results import (
        AT_SITES,
        RANDOM,
        TRAINED,
        TUNED_AT_SITES,
        UNRECORDED,
        Result,
    )
    from fedssl.sites.remote import Asking, AtSites, meet_classes
    from fedssl.sites.server import describe_failures, evaluate_encoder, tune_encoder
    from fedssl.sites.site import HeadSettings, TuneSettings

    wanted = Continuation(config.run, config.output_dir, config.num_rounds, {}, None)
    run = wanted.find_run()
    check_same(flatten(config), flatten(run.load_config()))
    backend, protocol = choose_backend(config.precision), config.eval
    checkpoint = run.last_checkpoint()
    method, round_number = load_trained(config, checkpoint, backend.device)
    nodes = Nodes(grid, build_patience(config), report, stop, membership)
    nodes.wait_for_clients()
    asking = Asking(nodes)
    classes = meet_classes(asking)
    for line in classes.describe_oddities(nodes.membership.label):
        report(f"{WARNING}{line}")
    seeds = [draw_seed(config.seed, draw) for draw in range(protocol.seeds)]
    given = protocol.label_fraction, seeds, protocol.min_images, protocol.folds
    settings = AtSites(*given, round_number)
    tuned = "rounds" in protocol
    encoders = {f"{TRAINED}{name_of(config.method)}": method.encoder}
    if protocol.baselines:
        encoders[RANDOM] = build_method(config, backend.device).encoder
    evaluations = []
    for name, encoder in encoders.items():
        try:
            asked = asking, name, encoder, classes, settings
            evaluated = (
                tune_encoder(*asked, select(TuneSettings, protocol))
                if tuned
                else evaluate_encoder(*asked, select(HeadSettings, protocol))
            )
        except ValueError as error:
            raise RuntimeError(f"{error}{describe_failures(asking)}") from error
        evaluations.append(evaluated)
    rows = [row for each in evaluations for row in each.scores]
    for line in dict.fromkeys(f"{each.who}: {each.reason}" for each in asking.failures):
        report(f"{WARNING}left out: {line}")
    first = (rows[0].sites or [{}])[0]
    for site, count in first.get("left_out", {}).items():
        who = nodes.membership.label(site)
        line = f"{who} leaves out {count} of {len(classes.names)} classes, with fewer labelled "
        report(f"{WARNING}{line}images there than eval.min_images={protocol.min_images}")
    result = Result(
        mode=TUNED_AT_SITES if tuned else AT_SITES,
        dataset=title_of_images(config.dataset),
        protocol={key: protocol[key] for key in protocol if key not in UNRECORDED},
        round=round_number,
        labelled_images=evaluations[0].labelled,
        test_images=evaluations[0].tested,
        rows=rows,
        seed=config.seed,
        checkpoint=checkpoint.name,
        precision=str(backend.dtype).removeprefix("torch."),
        measured=provenance(),
        privacy=spent_privacy(run, config, round_number),
    )
    with writing_to(run.path):
        run.add_result(result.to_json())
        keep_classifier(run, config, method.encoder, result, classes.names)
    return result


def run_facts(config: DictConfig) -> "RunFacts":
    """Say what the page of a run tells of it."""
    from fedssl.reporting.sections import RunFacts

    return RunFacts(
        dataset=name_of_images(config.dataset),
        method=name_of(config.method),
        loss_name=cast(type[Method], get_class(config.method._target_)).loss_name,
        encoder=config.model.encoder,
        strategy=name_of(config.strategy),
        partitioner=name_of(config.partition),
        num_rounds=config.num_rounds,
        seed=config.seed,
        held_out=config.held_out,
        settings=plain(config),
    )


def run_images(run: RunDirectory, config: DictConfig, image_set: ImageSet) -> "RunImages":
    """Load what the pictures of a run show: images, and encoders before and after training.

    Raises:
        UserError: no checkpoint, or a damaged one.
    """
    from fedssl.reporting.sections import Encoders, RunImages

    backend = choose_backend(config.precision)
    method, number = load_trained(config, run.last_checkpoint(), backend.device)
    untrained = build_method(config, backend.device).encoder
    resolution = build_schedule(config).eval_resolution(number)
    batch_size = config.eval.feature_batch_size
    encoders = Encoders(untrained, method.encoder, number, resolution, batch_size, backend)
    return RunImages(image_set, open_partitions(config, image_set), encoders)


def report_run(
    run: RunDirectory, config: DictConfig, figures: DictConfig, image_set: ImageSet | None
) -> None:
    """Write the page of a run.

    Args:
        figures: this section, or the settings of scripts/report.py, which have its keys at the top.
        image_set: None where only the clients hold images.

    Raises:
        UserError: no finished round, no checkpoint, or a damaged one.
        RuntimeError: the run's directory can't be written.
    """
    from fedssl.reporting.page import write_report
    from fedssl.reporting.sections import FigureSettings

    images = run_images(run, config, image_set) if image_set else None
    settings = FigureSettings(figures.map_images, figures.perplexity, figures.queries)
    write_report(run, run_facts(config), settings, images)
