"""Which pictures of a run there are, and what each one shows."""

from base64 import b64encode
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import DictConfig
from sklearn.manifold import TSNE, trustworthiness
from sklearn.preprocessing import normalize
from threadpoolctl import threadpool_limits

from fedssl.compute import choose_device, choose_dtype
from fedssl.data.image_set import ImageSet
from fedssl.data.partitions import count_classes, partition_rows, split_held_out
from fedssl.evaluation.features import extract_features
from fedssl.reporting.figures import (
    HEALTH,
    draw_health,
    draw_knn,
    draw_loss_graph,
    draw_map,
    draw_neighbours,
    draw_partitions,
)
from fedssl.runs.directory import RunDirectory
from fedssl.runs.metrics import RoundMetrics
from fedssl.seeding import derive_seed
from fedssl.training.schedule import encode_size
from utils import build_model, load_trained

MIN_MAPPED = 10  # fewer points make no map
Rounds = Sequence[RoundMetrics]


@dataclass(frozen=True)
class Picture:
    """An entry of the page.

    Attributes:
        caption: what it shows, or why it is left out.
        file: a PNG; None where it is left out.
    """

    title: str
    caption: str
    file: Path | None = None

    @property
    def data(self) -> str:
        """The file as a data URI."""
        return f"data:image/png;base64,{b64encode(self.file.read_bytes()).decode()}"


@dataclass(frozen=True)
class Encoded:
    """Some images, and their features (N, D) before and after training."""

    kind: str  # test or training
    pixels: np.ndarray
    labels: np.ndarray | None
    before: np.ndarray
    after: np.ndarray
    round: int


def draw_pictures(
    run: RunDirectory,
    config: DictConfig,
    settings: Mapping[str, Any],
    rounds: Rounds,
    image_set: ImageSet | None,
) -> list[Picture]:
    """Draw all that applies to a run into its figures/.

    Args:
        config: of the run.
        settings: the `figures` section.
        rounds: at least one.
        image_set: None where only the clients hold images.

    Raises:
        UserError: no checkpoint, or a damaged one.
    """
    folder = run.figures
    folder.mkdir(exist_ok=True)
    encoded = encode_some(run, config, settings, image_set) if image_set else None
    return [
        picture_loss(config, rounds, run.path / "loss_graph.png"),
        picture_knn(rounds, folder / "knn.png"),
        picture_map(config, settings, encoded, image_set, folder / "map.png"),
        picture_neighbours(settings, encoded, folder / "neighbours.png"),
        picture_partitions(config, rounds, image_set, folder / "partitions.png"),
        picture_health(rounds, folder / "health.png"),
    ]


def encode_some(
    run: RunDirectory, config: DictConfig, settings: Mapping[str, Any], image_set: ImageSet
) -> Encoded:
    """Encode some test images, or training images where there are none, drawn by the seed."""
    kind, images = ("test", image_set.test) if image_set.test else ("training", image_set.train)
    draw = np.random.default_rng(derive_seed(config.seed, "figures"))
    chosen = draw.permutation(len(images.pixels))[: settings["map_images"]]
    pixels, device = np.array(images.pixels[chosen]), choose_device()
    dtype, batch = choose_dtype(config.precision, device), config.eval.feature_batch_size
    trained, round_number = load_trained(config, run.last_checkpoint(), device)
    untrained = build_model(config.model, config.dataset, config.seed, device)
    place = round_number, config.num_rounds
    size = encode_size(config.train, config.dataset.image_size, *place)
    before, after = (
        extract_features(model, pixels, device, dtype, batch, size)
        for model in (untrained, trained)
    )
    labels = None if images.labels is None else images.labels[chosen]
    return Encoded(kind, pixels, labels, before, after, round_number)


def picture_loss(config: DictConfig, rounds: Rounds, file: Path) -> Picture:
    """Draw the loss over rounds."""
    draw_loss_graph(rounds, file, config.dataset.name)
    return Picture(
        "Loss",
        "NT-Xent of the clients' training images and of the images that each of them holds out. "
        "A batch of another size has another loss, so only the course of each line counts.",
        file,
    )


def picture_knn(rounds: Rounds, file: Path) -> Picture:
    """Draw the kNN accuracy over rounds."""
    title = "kNN accuracy"
    if all(metrics.knn is None for metrics in rounds):
        return Picture(title, "Left out: the server has no labelled images.")
    draw_knn(rounds, file)
    return Picture(
        title,
        "How many training images have the class of their nearest neighbours, after every "
        "round. The test set stays unseen until the end.",
        file,
    )


def picture_map(
    config: DictConfig,
    settings: Mapping[str, Any],
    encoded: Encoded | None,
    image_set: ImageSet | None,
    file: Path,
) -> Picture:
    """Draw the features before and after training in the plane."""
    title = "Map of the features"
    if encoded is None or encoded.labels is None:
        return Picture(title, "Left out: there are no labelled images to colour it by.")
    count = len(encoded.pixels)
    if count < MIN_MAPPED:
        return Picture(title, f"Left out: {count} {encoded.kind} images are too few.")
    perplexity = min(settings["perplexity"], (count - 1) / 3)
    seed = derive_seed(config.seed, "map") % 2**32
    maps, trust = zip(
        *(lay_out(features, perplexity, seed) for features in (encoded.before, encoded.after)),
        strict=True,
    )
    titles = ("random encoder", f"after round {encoded.round}")
    titled = dict(zip(titles, maps, strict=True))
    draw_map(titled, encoded.labels, image_set.class_names, file)
    return Picture(
        title,
        f"The same {count:,} {encoded.kind} images, coloured by class. t-SNE (perplexity "
        f"{perplexity:g}, started from PCA, one seed) of the features at unit length. Who is near "
        "whom means something; distances between groups and their sizes do not. Trustworthiness "
        f"of the nearness: {trust[0]:.2f} before, {trust[1]:.2f} after, of 1 at most.",
        file,
    )


def lay_out(features: np.ndarray, perplexity: float, seed: int) -> tuple[np.ndarray, float]:
    """Lay features (N, D) out in the plane by t-SNE of their directions.

    Returns:
        Points (N, 2), and their trustworthiness, 0 to 1: whether who is near
        whom there is near in the features, too.
    """
    unit = normalize(features)
    with threadpool_limits(1):  # a few points: threads would wait for each other a thousand times
        method = TSNE(perplexity=perplexity, init="pca", random_state=seed)
        points = method.fit_transform(unit)
    return points, float(trustworthiness(unit, points, n_neighbors=min(5, len(unit) // 2 - 1)))


def picture_neighbours(settings: Mapping[str, Any], encoded: Encoded | None, file: Path) -> Picture:
    """Draw images, of a class each where there are labels, beside their nearest neighbours."""
    title = "Nearest neighbours"
    if encoded is None or len(encoded.pixels) < 2:
        return Picture(title, "Left out: the server has no images.")
    queries = np.arange(len(encoded.pixels))
    if encoded.labels is not None:
        queries = np.unique(encoded.labels, return_index=True)[1]
    queries = queries[: settings["queries"]].tolist()
    draw_neighbours(encoded.pixels, encoded.after, file, queries)
    return Picture(
        title,
        f"{encoded.kind.capitalize()} images, and those of {len(encoded.pixels) - 1:,} others "
        f"that are most similar to the encoder after round {encoded.round}, by cosine.",
        file,
    )


def picture_partitions(
    config: DictConfig, rounds: Rounds, image_set: ImageSet | None, file: Path
) -> Picture:
    """Draw how the classes are spread over the clients."""
    title = "Images of the clients"
    if image_set is None or image_set.train.labels is None:
        return Picture(title, "Left out: there are no labels.")
    dealt = (config.num_clients, dict(config.partition), config.seed)
    parts = partition_rows(image_set.train, *dealt)
    if not _held(parts, config.held_out, rounds):
        return Picture(title, "Left out: the clients held other images than this dealing gives.")
    counts = count_classes(image_set, parts)
    draw_partitions(counts, image_set.class_names, file)
    dealer = config.partition._target_.rpartition(".")[2]
    return Picture(
        title,
        f"{counts.sum():,} training images, dealt out to {len(parts)} clients by {dealer}. "
        "Training does not look at the labels.",
        file,
    )


def _held(parts: Sequence[np.ndarray], held_out: float, rounds: Rounds) -> bool:
    """Tell whether the clients trained on as many images as these partitions have."""
    expected = dict(enumerate(len(split_held_out(part, held_out)[0]) for part in parts))
    return all(
        client.num_examples == expected.get(client.partition)
        for metrics in rounds
        for client in metrics.clients
        if client.num_examples is not None
    )


def picture_health(rounds: Rounds, file: Path) -> Picture:
    """Draw what tells a collapse."""
    title = "Health of the representation"
    if all(getattr(metrics, key) is None for metrics in rounds for key, _, _ in HEALTH):
        return Picture(title, "Left out: no client reported it.")
    draw_health(rounds, file)
    return Picture(
        title,
        "Of the projections of held-out images, mean over clients. Effective rank: how many "
        "directions are in use. Uniformity: how evenly the images are spread, lower is more even. "
        "Alignment: how far two views of an image lie apart, lower is nearer.",
        file,
    )
