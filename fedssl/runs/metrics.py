"""The numbers of a round: each is named once, with its label, format and where it is shown."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from enum import Flag, auto
from typing import Any


class Where(Flag):
    """The places that show a number of a round.

    TABLE: the terminal's line of a round; LOG: the log of a deployed run; CURVE:
    TensorBoard, over rounds; PAGE: the table of rounds in the report.
    """

    TABLE = auto()
    LOG = auto()
    CURVE = auto()
    PAGE = auto()


# What epsilon says nothing about; it stands wherever epsilon does.
NOT_COVERED = (
    "losses and the other numbers that clients tell",
    "how many images each has",
    "the kNN accuracy and the evaluations, which read the server's own labels",
    "who takes part in a round",
    "single images: a client's whole set is what one can't tell from none",
)
EVERYWHERE = Where.TABLE | Where.LOG | Where.CURVE | Where.PAGE
NOWHERE = Where(0)
Number = int | float | None


@dataclass(frozen=True)
class Shown:
    """How a number is shown.

    Attributes:
        label: the heading of its column, the name in a line of the log.
        form: a format specification, of the number times `scale`.
        unit: behind the number, with the space before it.
        where: the places that show it.
        seldom: most runs don't have it; tables leave its column out then.
    """

    label: str
    form: str
    unit: str = ""
    scale: float = 1.0
    where: Where = EVERYWHERE
    seldom: bool = False

    def text(self, value: float | None) -> str | None:
        """Write a value with its unit; None stays None."""
        if value is None:
            return None
        return f"{value * self.scale if self.scale != 1 else value:{self.form}}{self.unit}"


def shown(*how: Any, **more: Any) -> Any:
    """Declare a field that is shown; the arguments are those of `Shown`. Its default is None."""
    return field(default=None, metadata={"shown": Shown(*how, **more)})


class Named:
    """Something about the client of a partition, which may have a name."""

    partition: int
    name: str | None

    @property
    def who(self) -> str:
        """The client's name, or its partition's number."""
        return self.name or f"client {self.partition}"


@dataclass(frozen=True)
class ClientMetrics(Named):
    """A client's numbers of a round; what it did not take part in is None.

    Attributes:
        num_examples: images that it says it trained on.
        update_norm: Euclidean length of the way from the global parameters to its own.
        cosine: between its update and the sum of the others' updates.
        images: that its steps used, each time they did.
        num_held_out: images that it was evaluated on.
        unreadable_images: files that it left out.
        cores: of the CPU that it took.
        weight: of it in the average, where that is less than its images.
        numbers_cut: of its update, before it was masked.
        name: of its node, where the run knows names.
    """

    partition: int
    num_examples: int | None = None
    train_loss: float | None = field(default=None, metadata={"curve": True})
    eval_loss: float | None = field(default=None, metadata={"curve": True})
    update_norm: float | None = field(default=None, metadata={"curve": True})
    cosine: float | None = field(default=None, metadata={"curve": True})
    images: int | None = None
    images_per_second: float | None = None
    num_held_out: int | None = None
    unreadable_images: int | None = None
    cores: int | None = None
    weight: int | None = None
    numbers_cut: int | None = None
    name: str | None = None


@dataclass(frozen=True)
class Failure(Named):
    """A client that is left out of a round, and the reason in one line."""

    partition: int
    reason: str
    name: str | None = None


HAPPENED = {"joined": "is connected", "back": "is connected again", "left": "is gone"}


@dataclass(frozen=True)
class NodeEvent:
    """A node that came, went or was kept out.

    Attributes:
        event: "joined", "back", "left" or "refused".
        partition: that it holds or claims; None where nobody knows.
        name: of the node, where the run knows names.
        reason: why it is refused.
    """

    event: str
    partition: int | None = None
    name: str | None = None
    reason: str = ""

    @property
    def who(self) -> str:
        """The node's name and partition, as far as they are known."""
        if self.partition is None:
            return self.name or "a node"
        number = f"partition {self.partition}"
        return f"{self.name} ({number})" if self.name else number

    def __str__(self) -> str:
        happened = HAPPENED.get(self.event, self.event)
        return f"{self.who} {f'is refused: {self.reason}' if self.reason else happened}"


@dataclass(frozen=True)
class Progress:
    """How far a round is, told as its clients answer.

    Attributes:
        phase: "train" or "evaluate".
        answered: of the clients that were `asked`.
        images_per_second: of training so far; None before the first answer and of an
            evaluation.
    """

    phase: str
    answered: int
    asked: int
    images_per_second: float | None = None


@dataclass(frozen=True)
class RoundMetrics:
    """The numbers of a round, a line of metrics.jsonl.

    Losses are the method's, means over clients weighted by their images; None where
    nobody could tell. `knn` is top-1 from 0 to 1. `bytes_moved` counts what messages
    carry, to the clients and back, `bytes_up` what replies do. `epsilon` at `delta` is of
    all rounds so far, see fedssl/federation/privacy.py.
    """

    round: int
    train_loss: float | None = shown("train loss", ".3f")
    eval_loss: float | None = shown("eval loss", ".3f")
    effective_rank: float | None = shown(
        "rank", ".1f", where=Where.TABLE | Where.CURVE | Where.PAGE
    )
    uniformity: float | None = shown("uniformity", ".2f", where=Where.CURVE | Where.PAGE)
    alignment: float | None = shown("alignment", ".2f", where=Where.CURVE | Where.PAGE)
    knn: float | None = shown("kNN", ".1%")
    seconds: float | None = shown("time", ".1f", " s")
    seconds_train: float | None = None
    seconds_evaluate: float | None = None
    seconds_knn: float | None = None
    images_per_second: float | None = shown(
        "images/s", ",.0f", where=Where.LOG | Where.CURVE | Where.PAGE
    )
    bytes_moved: int | None = shown(
        "moved", ",.0f", " MB", 1e-6, where=Where.LOG | Where.CURVE | Where.PAGE
    )
    bytes_up: int | None = None
    epsilon: float | None = shown("epsilon", ".2f", seldom=True)
    delta: float | None = None
    clients: tuple[ClientMetrics, ...] = ()
    failures: tuple[Failure, ...] = ()
    warnings: tuple[str, ...] = ()
    nodes: tuple[NodeEvent, ...] = ()

    @classmethod
    def numbers(cls, where: Where, seldom: bool = True) -> Iterator[tuple[str, Shown]]:
        """List the names of the numbers that a place shows, in order, and how.

        Args:
            seldom: also those that most runs don't have.
        """
        for each in fields(cls):
            how = each.metadata.get("shown")
            if how and how.where & where and (seldom or not how.seldom):
                yield each.name, how

    def texts(self, where: Where) -> dict[str, str | None]:
        """Write what a place shows, by label; None where there is no number."""
        return {how.label: how.text(getattr(self, name)) for name, how in self.numbers(where)}

    def curves(self) -> dict[str, float]:
        """List the numbers that are curves over rounds.

        A section for each curve of the clients, `client_NAME/PARTITION`, so that
        the clients stand side by side.
        """
        found = {name: getattr(self, name) for name, _ in self.numbers(Where.CURVE)}
        for client in self.clients:
            for each in fields(client):
                if each.metadata.get("curve"):
                    tag = f"client_{each.name}/{client.partition}"
                    found[tag] = getattr(client, each.name)
        return {tag: value for tag, value in found.items() if value is not None}

    def to_json(self) -> dict[str, Any]:
        """Give what a line of metrics.jsonl holds; what a client or node lacks is left out."""
        told = {
            key: [_given(each) for each in getattr(self, key)]
            for key in ("clients", "failures", "nodes")
        }
        found = asdict(self) | told
        if self.epsilon is None:
            del found["epsilon"], found["delta"]
        return found

    @classmethod
    def from_json(cls, line: Mapping[str, Any]) -> "RoundMetrics":
        """Read a line of metrics.jsonl, of an older run, too.

        Raises:
            ValueError: it is no round of a run.
        """
        if not isinstance(line, Mapping) or not {"round", "clients", "failures"} <= line.keys():
            raise ValueError("no round of a run")
        known = {each.name for each in fields(cls)}
        values = {name: value for name, value in line.items() if name in known}
        try:
            values["clients"] = tuple(_client(client) for client in line["clients"])
            values["failures"] = tuple(Failure(**failure) for failure in line["failures"])
            values["nodes"] = tuple(NodeEvent(**event) for event in line.get("nodes", ()))
            values["warnings"] = tuple(line.get("warnings", ()))
            metrics = cls(**values)
        except (TypeError, AttributeError) as error:
            raise ValueError(f"no round of a run ({error})") from error
        numbers = {name: getattr(metrics, name) for name, _ in cls.numbers(EVERYWHERE)}
        odd = [name for name, value in numbers.items() if not isinstance(value, Number)]
        if odd or not isinstance(metrics.round, int):
            raise ValueError(f"no round of a run ({(odd or ['round'])[0]} is no number)")
        return metrics


def _given(part: Any) -> dict[str, Any]:
    """List what a client's numbers, a failure or an event hold."""
    return {key: value for key, value in asdict(part).items() if value not in (None, "")}


def _client(line: Mapping[str, Any]) -> ClientMetrics:
    known = {each.name for each in fields(ClientMetrics)}
    values = {name: value for name, value in line.items() if name in known}
    if "step" in line:  # its name until version 1.1
        values["update_norm"] = line["step"]
    return ClientMetrics(**values)
