"""The sites of a real federation, asked by messages; who answers nonsense is named, not added."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from difflib import get_close_matches
from typing import NamedTuple, TypeVar

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict
from torch import Tensor

from fedssl.federation.guards import (
    MAX_EXAMPLES,
    check_num_examples,
    check_state,
    read_metrics,
    read_replies,
)
from fedssl.federation.messages import ARRAYS, CONFIG, METRICS, read_array_record
from fedssl.federation.nodes import Nodes
from fedssl.runs.metrics import Failure
from fedssl.sites.answers import (
    CLASSES,
    DRAW,
    LABELS,
    SETTINGS,
    STEP,
    normalize,
    read_arrays,
    read_heads,
    stack_heads,
    write,
)
from fedssl.sites.site import Counts, HeadSettings, Sites, Trained, TuneSettings
from fedssl.sites.sums import BINS, TEMPERATURES, Head, Judgement, Sums, unpack_sums
from fedssl.sites.tuning import State, Tuned

MOST_CLASSES = 10_000
LONGEST_NAME = 255  # of a class: as long as a folder's

Read = TypeVar("Read")
ConfigValue = str | int | float


class Asking:
    """Asks nodes a step about their labels, and remembers who failed and why."""

    def __init__(self, nodes: Nodes) -> None:
        """Ask those nodes that are connected."""
        self.nodes = nodes
        self.failures: list[Failure] = []

    def ask(
        self,
        step: str,
        read: Callable[[int, RecordDict], Read],
        config: Mapping[str, ConfigValue] | None = None,
        arrays: Mapping[int, Mapping[str, np.ndarray]] | None = None,
        encoder: ArrayRecord | None = None,
        sites: Sequence[int] | None = None,
    ) -> dict[int, Read]:
        """Send a step to sites and read their answers.

        Args:
            read: takes the site's number and its answer; raises ValueError for an odd one.
            arrays: for each site that is asked; None sends none.
            encoder: its state, for all of them.
            sites: that are asked; None asks those of `arrays`, or all.

        Returns:
            What was read, by the site's number.
        """
        messages = []
        chosen = arrays if sites is None else sites
        for node in self.nodes.get_node_ids():
            site = self.nodes.partition_of[node]
            if chosen is not None and site not in chosen:
                continue
            content = RecordDict({CONFIG: ConfigRecord({STEP: step, **(config or {})})})
            if arrays is not None:
                content = RecordDict({**content, **write(arrays[site])})
            if encoder is not None:
                content[ARRAYS] = encoder
            messages.append(Message(content, node, LABELS))
        answers = self.nodes.send_and_receive(messages)
        found, failures = read_replies(
            answers,
            self.nodes.partition_of,
            lambda site, reply: (site, read(site, reply.content)),
        )
        self.failures += failures
        return dict(found)


class Classes:
    """The classes of a federation: those of all sites, by name."""

    def __init__(self, told: Mapping[int, Sequence[str]]) -> None:
        """Gather the names.

        Args:
            told: names of the classes of each site.
        """
        spelled: dict[str, str] = {}
        where: dict[str, list[int]] = {}
        for site in sorted(told):
            for name in told[site]:
                spelled.setdefault(normalize(name), name)
                where.setdefault(normalize(name), []).append(site)
        self.keys = sorted(spelled)
        self.names = [spelled[key] for key in self.keys]
        self._where = where

    def describe_oddities(self, who: Callable[[int], str]) -> list[str]:
        """Name classes that one site alone has and that are spelled nearly as another one.

        Args:
            who: names a site.
        """
        lines = []
        for key, sites in self._where.items():
            others = [other for other in self.keys if len(self._where[other]) > len(sites)]
            close = get_close_matches(key, others, n=1, cutoff=0.75)
            if len(sites) == 1 and close and sites[0] not in self._where[close[0]]:
                has = f"{who(sites[0])} has a class {key!r}, as no other site has"
                lines.append(f"{has}; is it {close[0]!r}?")
        return lines


def meet_classes(asking: Asking) -> Classes:
    """Ask all sites for their classes.

    Raises:
        RuntimeError: no site has labels, or all of one class.
    """

    def read(site: int, content: RecordDict) -> list[str]:
        read_metrics(content, ("num-examples", "num-tested"))
        try:
            names = json.loads(str(content.config_records[CONFIG][CLASSES]))
        except (KeyError, ValueError, RecursionError) as error:
            raise ValueError("the reply names no classes") from error
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise ValueError("the classes are no names")
        if len(names) > MOST_CLASSES:
            raise ValueError(f"it names {len(names):,} classes; at most {MOST_CLASSES:,} are read")
        if odd := [name for name in names if len(name) > LONGEST_NAME or not name.isprintable()]:
            raise ValueError(f"class {odd[0][:20]!r} has a name that is too long or can't be shown")
        return names

    classes = Classes(asking.ask("classes", read))
    if not classes.names:
        raise RuntimeError("no site has labelled images; give class folders to the nodes")
    if len(classes.names) == 1:
        raise RuntimeError(
            f"all labels are {classes.names[0]!r}, so there is nothing to tell apart"
        )
    return classes


@dataclass(frozen=True)
class AtSites:
    """How encoders are evaluated at the sites.

    Attributes:
        fraction: share of each site's labels that a draw gives.
        seeds: of the draws.
        min_images: of a class at a site, for its sum to leave it.
        folds: of sites at most, which choose the weight decay.
        round_number: of the checkpoint, which decides the size of the images.
    """

    fraction: float
    seeds: Sequence[int]
    min_images: int
    folds: int
    round_number: int


class Told(NamedTuple):
    """What a site tells once it has encoded its images.

    Attributes:
        labelled: images of the first draw, tested: its test images.
        left_out: classes with too few labelled images, for each draw.
    """

    labelled: int
    tested: int
    left_out: list[int]


def spread_encoder(
    asking: Asking, encoder: Mapping[str, Tensor], classes: Classes, settings: AtSites
) -> dict[int, Told]:
    """Let all sites encode their labelled images.

    Args:
        encoder: its state.

    Returns:
        What each site tells, by its number.
    """
    config = _describe(classes, settings) | {"seeds": json.dumps(list(settings.seeds))}

    def read(site: int, content: RecordDict) -> Told:
        told = read_metrics(content, ("num-examples", "num-tested"))
        for name, value in told.items():
            if not 0 <= value <= MAX_EXAMPLES:
                raise ValueError(f"{name} is {value:g}")
        left_out = content.metric_records[METRICS].get("left-out")
        counts = left_out if isinstance(left_out, list) else []
        if len(counts) != len(settings.seeds) or any(type(count) is not int for count in counts):
            raise ValueError("the reply does not tell which classes it leaves out")
        counts = [min(max(int(count), 0), len(classes.keys)) for count in counts]
        return Told(int(told["num-examples"]), int(told["num-tested"]), counts)

    return asking.ask("features", read, config, encoder=ArrayRecord(dict(encoder)))


def _describe(classes: Classes, settings: AtSites) -> dict[str, ConfigValue]:
    """Say which labels a site is to use, and by which numbers."""
    return {
        CLASSES: json.dumps(classes.keys),
        "fraction": settings.fraction,
        "min-images": settings.min_images,
        "server-round": settings.round_number,
    }


def tune_remotely(
    asking: Asking,
    classes: Classes,
    settings: AtSites,
    training: TuneSettings,
    seed: int,
    state: State,
    round_number: int,
) -> dict[int, Tuned]:
    """Let all sites tune an encoder with its head for a round.

    Args:
        seed: of the draw of labels.
        state: of the `Classifying`.
        round_number: counted from 0.

    Returns:
        What those with labelled images answer, by the site's number.
    """
    config = _describe(classes, settings) | {
        "seed": seed,
        "tune-round": round_number,
        SETTINGS: json.dumps(asdict(training)),
    }

    def read(site: int, content: RecordDict) -> Tuned:
        images = int(read_metrics(content, ("num-examples",))["num-examples"])
        if not images:
            return Tuned({}, 0)
        tuned = read_array_record(content)
        check_state(tuned, state)
        return Tuned(tuned, check_num_examples(images))

    found = asking.ask("tune", read, config, encoder=ArrayRecord(dict(state)))
    return {site: tuned for site, tuned in found.items() if tuned.images}


class RemoteSites(Sites):
    """Sites that answer by messages, with one draw of labels."""

    def __init__(
        self,
        asking: Asking,
        told: Mapping[int, Told],
        draw: int,
        seed: int,
        size: int,
        classes: int,
    ) -> None:
        """Ask those sites that have encoded their images.

        Args:
            told: what each of them told then.
            draw, seed: number and seed of the draw.
            size, classes: D and C, of the heads and of what comes back.
        """
        self.asking, self.numbers, self.seed = asking, sorted(told), seed
        self._left_out = {site: each.left_out[draw] for site, each in told.items()}
        self._tested = {site: each.tested for site, each in told.items()}
        self.config: dict[str, ConfigValue] = {DRAW: draw}
        self.size, self.classes = size, classes
        self.images: dict[int, int] = {}

    def sums(self) -> dict[int, Sums]:
        """Ask for the sums; those that can't be sums of features are left out."""

        def read(site: int, content: RecordDict) -> Sums:
            arrays = read_arrays(content, "sums")
            if not arrays.get("counts", np.ones(1)).any():  # nothing, of whatever size
                return nothing(self.size, self.classes)
            sums = unpack_sums(arrays, self.size, self.classes)
            check_num_examples(sums.images)
            return sums

        found = self.asking.ask("sums", read, self.config, sites=self.numbers)
        self.images = {site: sums.images for site, sums in found.items()}
        self.numbers = sorted(found)  # who lied here is not asked again
        return found

    def judge(self, heads: Mapping[int, Sequence[Head]]) -> dict[int, Judgement]:
        """Ask for judgements; no more images can be right than a site has."""

        def read(site: int, content: RecordDict) -> Judgement:
            shapes: dict[str, tuple[int, ...]] = {"correct": (1, len(heads[site]))}
            shapes["surprise"] = (*shapes["correct"], len(TEMPERATURES))
            told = read_counts(content, shapes)
            if (told["correct"] > self.images[site]).any():
                raise ValueError("it counts more correct images than it has")
            return Judgement(told["correct"][0], told["surprise"][0])

        arrays = {site: stack_heads(given) for site, given in heads.items()}
        return self.asking.ask("judge", read, self.config, arrays)

    def train(
        self, head: Head, mean: np.ndarray, scale: np.ndarray, settings: HeadSettings, epoch: int
    ) -> dict[int, Trained]:
        """Ask the sites with labelled images to train."""
        config = self.config | {
            "epoch": epoch,
            "seed": self.seed,
            SETTINGS: json.dumps(asdict(settings)),
        }

        def read(site: int, content: RecordDict) -> Trained:
            (trained,) = read_heads(content)
            if trained.weight.shape != head.weight.shape:
                raise ValueError(f"its head has shape {trained.weight.shape}")
            if not all(np.isfinite(value).all() for value in (trained.weight, trained.bias)):
                raise ValueError("its head is not finite")
            return Trained(trained, self.images[site])

        given = {**stack_heads([head]), "mean": mean, "scale": scale}
        filled = [site for site in self.numbers if self.images[site]]
        return self.asking.ask("train", read, config, dict.fromkeys(filled, given))

    def test(self, heads: Sequence[Head]) -> dict[int, list[Counts]]:
        """Ask for counts over the test images."""
        return self._count("test", heads)

    def test_own(self, shared: Head) -> dict[int, Counts]:
        """Ask for counts over the test images, by each site's own head."""
        return {site: counts for site, (counts,) in self._count("test-own", [shared]).items()}

    def left_out(self) -> dict[int, int]:
        """Give what the sites told."""
        return {site: self._left_out[site] for site in self.numbers}

    def _count(self, step: str, heads: Sequence[Head]) -> dict[int, list[Counts]]:
        shapes: dict[str, tuple[int, ...]] = {
            "confusion": (len(heads), self.classes, self.classes),
            "reliability": (len(heads), BINS, 3),
        }

        def read(site: int, content: RecordDict) -> list[Counts]:
            told = read_counts(content, shapes)
            images = told["confusion"].sum(axis=(1, 2))
            if not np.array_equal(images, told["reliability"][..., 0].sum(axis=1)):
                raise ValueError("confusion and reliability count different images")
            if (images != self._tested[site]).any():
                raise ValueError(f"it counts other images than its {self._tested[site]} for tests")
            return list(map(Counts, told["confusion"], told["reliability"]))

        arrays = dict.fromkeys(self.numbers, stack_heads(heads))
        return self.asking.ask(step, read, self.config, arrays)


def read_counts(
    content: RecordDict, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, np.ndarray]:
    """Read arrays of numbers that can't be below zero.

    Raises:
        ValueError: one is missing, of another shape, not finite, or below zero.
    """
    told = read_arrays(content, "counts")
    for name, shape in shapes.items():
        value = told.get(name)
        if value is None or value.shape != shape:
            raise ValueError(f"{name} has no shape {shape}")
        if not np.isfinite(value).all() or (value < 0).any():
            raise ValueError(f"{name} holds numbers that can't be")
    return told


def nothing(size: int, classes: int) -> Sums:
    """Give the sums of no images."""
    counts = np.zeros(classes, dtype=np.int64)
    return Sums(counts, np.zeros((size, classes)), np.zeros((size, size)))
