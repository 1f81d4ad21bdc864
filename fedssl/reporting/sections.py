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

from fedssl.compute import Backend
from fedssl.data.image_set import ImageSet
from fedssl.data.partitions import count_classes, partition_rows, split_held_out
from fedssl.evaluation.features import extract_features
from fedssl.networks.encoder import Encoder
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
from fedssl.seeding import derive_seed

MIN_MAPPED = 10  # fewer points make no map
Rows = Sequence[Mapping[str, Any]]


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
class Encoders:
    """What a run made of its encoder.

    Attributes:
        untrained: at the run's random initialization.
        trained: after a round.
        resolution: side in pixels of the whole images that both see.
    """

    untrained: Encoder
    trained: Encoder
    round: int
    resolution: int
    backend: Backend


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
    rows: Rows,
    image_set: ImageSet | None,
    encoders: Encoders | None,
) -> list[Picture]:
    """Draw all that applies to a run into its figures/.

    Args:
        config: of the run.
        settings: the `figures` section.
        rows: of metrics.jsonl, at least one.
        image_set: None where only the clients hold images.
        encoders: None leaves out what shows features.
    """
    folder = run.figures
    folder.mkdir(exist_ok=True)
    encoded = None
    if image_set and encoders:
        count, batch_size = settings["map_images"], config.eval.feature_batch_size
        encoded = encode_some(image_set, encoders, count, config.seed, batch_size)
    return [
        picture_loss(config, rows, run.path / "loss_graph.png"),
        picture_knn(rows, folder / "knn.png"),
        picture_map(config, settings, encoded, image_set, folder / "map.png"),
        picture_neighbours(settings, encoded, folder / "neighbours.png"),
        picture_partitions(config, rows, image_set, folder / "partitions.png"),
        picture_health(rows, folder / "health.png"),
    ]


def encode_some(
    image_set: ImageSet, encoders: Encoders, count: int, seed: int, batch_size: int
) -> Encoded:
    """Encode some test images, or training images where there are none, drawn by the seed.

    Args:
        count: images at most.
        batch_size: images encoded at once.
    """
    kind, images = ("test", image_set.test) if image_set.test else ("training", image_set.train)
    draw = np.random.default_rng(derive_seed(seed, "figures"))
    chosen = draw.permutation(len(images.pixels))[:count]
    pixels = np.array(images.pixels[chosen])
    before, after = (
        extract_features(encoder, pixels, encoders.backend, batch_size, encoders.resolution)
        for encoder in (encoders.untrained, encoders.trained)
    )
    labels = None if images.labels is None else images.labels[chosen]
    return Encoded(kind, pixels, labels, before, after, encoders.round)


def picture_loss(config: DictConfig, rows: Rows, file: Path) -> Picture:
    """Draw the loss over rounds."""
    draw_loss_graph(rows, file, config.dataset.name)
    return Picture(
        "Loss",
        "NT-Xent of the clients' training images and of the images that each of them holds out. "
        "A batch of another size has another loss, so only the course of each line counts.",
        file,
    )


def picture_knn(rows: Rows, file: Path) -> Picture:
    """Draw the kNN accuracy over rounds."""
    title = "kNN accuracy"
    if all(row["knn"] is None for row in rows):
        return Picture(title, "Left out: the server has no labelled images.")
    draw_knn(rows, file)
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
    config: DictConfig, rows: Rows, image_set: ImageSet | None, file: Path
) -> Picture:
    """Draw how the classes are spread over the clients."""
    title = "Images of the clients"
    if image_set is None or image_set.train.labels is None:
        return Picture(title, "Left out: there are no labels.")
    parts = partition_rows(image_set.train, config.num_clients, config.partition, config.seed)
    if not _held(parts, config.held_out, rows):
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


def _held(parts: Sequence[np.ndarray], held_out: float, rows: Rows) -> bool:
    """Tell whether the clients trained on as many images as these partitions have."""
    expected = dict(enumerate(len(split_held_out(part, held_out)[0]) for part in parts))
    return all(
        client["num_examples"] == expected.get(client["partition"])
        for row in rows
        for client in row["clients"]
        if "num_examples" in client
    )


def picture_health(rows: Rows, file: Path) -> Picture:
    """Draw what tells a collapse."""
    title = "Health of the representation"
    if all(row.get(key) is None for row in rows for key, _, _ in HEALTH):
        return Picture(title, "Left out: no client reported it.")
    draw_health(rows, file)
    return Picture(
        title,
        "Of the projections of held-out images, mean over clients. Effective rank: how many "
        "directions are in use. Uniformity: how evenly the images are spread, lower is more even. "
        "Alignment: how far two views of an image lie apart, lower is nearer.",
        file,
    )
