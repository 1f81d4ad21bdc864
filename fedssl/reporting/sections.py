"""Which pictures of a run there are, and what each one shows."""

from base64 import b64encode
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.manifold import TSNE, trustworthiness
from sklearn.preprocessing import normalize
from threadpoolctl import threadpool_limits

from fedssl.compute import Backend
from fedssl.data.image_set import ImageSet
from fedssl.data.partitions import count_classes, split_held_out
from fedssl.data.sources.base import NO_LABEL
from fedssl.evaluation.features import extract_features
from fedssl.networks.encoder import Encoder
from fedssl.reporting.figures import (
    REPRESENTATION,
    draw_knn,
    draw_loss_graph,
    draw_map,
    draw_neighbours,
    draw_partitions,
    draw_representation,
    draw_sites,
)
from fedssl.runs.directory import RunDirectory
from fedssl.runs.encoder_file import CLASSIFIER_FILE, read_classes
from fedssl.runs.metrics import RoundMetrics
from fedssl.seeding import derive_seed

MIN_MAPPED = 10  # fewer points make no map
MAX_SITES = 20  # with a bar of their own
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
        data = self.file.read_bytes() if self.file else b""
        return f"data:image/png;base64,{b64encode(data).decode()}"


@dataclass(frozen=True)
class RunFacts:
    """What a page says of a run.

    Attributes:
        dataset, method, encoder, strategy, partitioner: their names.
        held_out: share of each client's images.
        settings: the whole configuration, as plain Python.
    """

    dataset: str
    method: str
    loss_name: str
    encoder: str
    strategy: str
    partitioner: str
    num_rounds: int
    seed: int
    held_out: float
    settings: Mapping[str, Any]


@dataclass(frozen=True)
class FigureSettings:
    """How pictures are drawn.

    Attributes:
        map_images: on the map, and among which neighbours are looked for, at most.
        perplexity: of t-SNE: so many neighbours of each image are kept near it.
        queries: images whose nearest neighbours are shown.
    """

    map_images: int
    perplexity: float
    queries: int


@dataclass(frozen=True)
class RunImages:
    """The images of a run, where the server has any.

    Attributes:
        parts: the rows of each client.
        encoders: what features are shown of.
    """

    image_set: ImageSet
    parts: Sequence[np.ndarray]
    encoders: "Encoders"


@dataclass(frozen=True)
class Encoders:
    """What a run made of its encoder.

    Attributes:
        untrained: at the run's random initialization.
        trained: after a round.
        resolution: side in pixels of the whole images that both see.
        batch_size: images encoded at once.
    """

    untrained: Encoder
    trained: Encoder
    round: int
    resolution: int
    batch_size: int
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
    facts: RunFacts,
    settings: FigureSettings,
    rounds: Rounds,
    images: RunImages | None,
) -> list[Picture]:
    """Draw all that applies to a run into its figures/.

    Args:
        rounds: at least one.
        images: None where only the clients hold images.
    """
    folder = run.figures
    folder.mkdir(exist_ok=True)
    encoded = encode_some(images, settings.map_images, facts.seed) if images else None
    names = images.image_set.class_names if images else []
    return [
        picture_loss(facts, rounds, run.path / "loss_graph.png"),
        picture_knn(rounds, folder / "knn.png"),
        picture_map(settings.perplexity, facts.seed, encoded, names, folder / "map.png"),
        picture_neighbours(settings.queries, encoded, folder / "neighbours.png"),
        picture_partitions(facts, rounds, images, folder / "partitions.png"),
        picture_representation(rounds, folder / "representation.png"),
        *picture_sites(run, folder / "sites.png"),
    ]


def encode_some(images: RunImages, count: int, seed: int) -> Encoded:
    """Encode some test images, or training images where there are none, drawn by the seed.

    Args:
        count: images at most.
    """
    image_set, encoders = images.image_set, images.encoders
    kind, some = ("test", image_set.test) if image_set.test else ("training", image_set.train)
    draw = np.random.default_rng(derive_seed(seed, "figures"))
    chosen = draw.permutation(len(some.pixels))[:count]
    pixels = np.array(some.pixels[chosen])
    how = encoders.backend, encoders.batch_size, encoders.resolution
    before, after = (
        extract_features(encoder, pixels, *how)
        for encoder in (encoders.untrained, encoders.trained)
    )
    labels = None if some.labels is None else some.labels[chosen]
    return Encoded(kind, pixels, labels, before, after, encoders.round)


def picture_loss(facts: RunFacts, rounds: Rounds, file: Path) -> Picture:
    """Draw the loss over rounds."""
    draw_loss_graph(rounds, file, f"{facts.method} on {facts.dataset}", facts.loss_name)
    return Picture(
        "Loss",
        f"{facts.method}'s loss of the clients' training images, and of the images that each of "
        "them holds out. A batch of another size has another loss, so only the course of each "
        "line counts.",
        file,
    )


def picture_knn(rounds: Rounds, file: Path) -> Picture:
    """Draw the kNN accuracy over rounds."""
    title = "kNN accuracy"
    if all(metrics.knn is None for metrics in rounds):
        return Picture(title, "Left out: it was never measured; that takes labelled images.")
    draw_knn(rounds, file)
    return Picture(
        title,
        "How many training images have the class of their nearest neighbours, at every "
        "evaluation. The test set stays unseen until the end.",
        file,
    )


def picture_map(
    perplexity: float, seed: int, encoded: Encoded | None, class_names: Sequence[str], file: Path
) -> Picture:
    """Draw the features before and after training in the plane."""
    title = "Map of the features"
    if encoded is None or encoded.labels is None:
        return Picture(title, "Left out: there are no labelled images to colour it by.")
    count = len(encoded.pixels)
    if count < MIN_MAPPED:
        return Picture(title, f"Left out: {count} {encoded.kind} images are too few.")
    perplexity = min(perplexity, (count - 1) / 3)
    seed = derive_seed(seed, "map") % 2**32
    maps, trust = zip(
        *(lay_out(features, perplexity, seed) for features in (encoded.before, encoded.after)),
        strict=True,
    )
    titles = ("random encoder", f"after round {encoded.round}")
    titled = dict(zip(titles, maps, strict=True))
    draw_map(titled, encoded.labels, class_names, file)
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


def picture_neighbours(count: int, encoded: Encoded | None, file: Path) -> Picture:
    """Draw images, of a class each where there are labels, beside their nearest neighbours."""
    title = "Nearest neighbours"
    if encoded is None or len(encoded.pixels) < 2:
        return Picture(title, "Left out: the server has no images.")
    queries = np.arange(len(encoded.pixels))
    if encoded.labels is not None:
        classes, firsts = np.unique(encoded.labels, return_index=True)
        queries = firsts[classes != NO_LABEL]
    queries = queries[:count].tolist()
    draw_neighbours(encoded.pixels, encoded.after, file, queries)
    return Picture(
        title,
        f"{encoded.kind.capitalize()} images, and those of {len(encoded.pixels) - 1:,} others "
        f"that are most similar to the encoder after round {encoded.round}, by cosine.",
        file,
    )


def picture_partitions(
    facts: RunFacts, rounds: Rounds, images: RunImages | None, file: Path
) -> Picture:
    """Draw how the classes are spread over the clients."""
    title = "Images of the clients"
    if images is None or images.image_set.train.labels is None:
        return Picture(title, "Left out: there are no labels.")
    image_set, parts = images.image_set, images.parts
    if not _held(parts, facts.held_out, rounds):
        return Picture(title, "Left out: the clients held other images than this dealing gives.")
    counts = count_classes(image_set, parts)
    draw_partitions(counts, image_set.class_names, file)
    return Picture(
        title,
        f"{counts.sum():,} training images, dealt out to {len(parts)} clients by "
        f"{facts.partitioner}. Training does not look at the labels.",
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


def picture_representation(rounds: Rounds, file: Path) -> Picture:
    """Draw what tells a collapse."""
    title = "Metrics of the representation"
    if all(getattr(metrics, key) is None for metrics in rounds for key, _, _ in REPRESENTATION):
        return Picture(title, "Left out: no client has reported it.")
    draw_representation(rounds, file)
    return Picture(
        title,
        "Of the projections of held-out images, mean over clients. Effective rank: how many "
        "directions are in use. Uniformity: how evenly the images are spread, lower is more even. "
        "Alignment: how far two views of an image lie apart, lower is nearer.",
        file,
    )


def picture_sites(run: RunDirectory, file: Path) -> list[Picture]:
    """Draw the last evaluation at the sites, if there was one."""
    rows = [result["rows"][0] for result in run.read_results()]
    scores = [row for row in rows if row.get("sites")]
    if not scores:
        return []
    told = scores[-1]["sites"][0]
    confusion, names = np.array(told["confusion"]), read_classes(run.path / CLASSIFIER_FILE)
    if len(names) != len(confusion):
        names = [str(number) for number in range(len(confusion))]
    by_site = dict(list(told["by_site"].items())[:MAX_SITES])
    draw_sites(confusion, names, by_site, file)
    more = len(told["by_site"]) - len(by_site)
    return [
        Picture(
            "Evaluation at the sites",
            f"{scores[-1]['method'].capitalize()}, scored on the test images of "
            f"{len(told['by_site'])} sites: each class by what it is taken for, and the share of "
            "each site's images that is right" + (f" ({more} more are left out)." if more else "."),
            file,
        )
    ]
