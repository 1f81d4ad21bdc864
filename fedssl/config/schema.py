"""Every setting of every program: its place, and by the models its type, range and help.

A new option of a group is a yaml below conf/ and a line here. The defaults reach Hydra
as `schema/NAME` of its ConfigStore, from which the yaml files start.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from hydra.core.config_store import ConfigStore
from pydantic import Field

from fedssl.config import sections
from fedssl.config.fields import Partitions, Section, layout_of
from fedssl.config.sections import LARGEST_SEED

Precision = Literal["auto", "float32", "bfloat16"]
PRECISION: Any = Field(default="auto", description="auto, float32 or bfloat16")
CACHE_DIR = Field(default="~/.cache/federated-simclr", description="decoded images")
RUN = "outputs/latest"


class Monitor(Section):
    """The kNN accuracy at every evaluation, on training images; the test set stays unseen."""

    bank: int = Field(default=2000, ge=1, description="labelled images to compare with")
    queries: int = Field(default=1000, ge=1, description="images to classify at every evaluation")
    neighbors: int = Field(default=10, ge=1, description="that decide")


class SecureAggregation(Section):
    """How updates are masked, where they are."""

    threshold: float = Field(
        default=0.67,
        ge=0.5,
        lt=1,
        description="more than this share of a round's clients must answer to its end",
    )
    max_ratio: float = Field(
        default=1.0,
        gt=0,
        description="clients clip their update to so many times the length of the weights",
    )
    largest: float = Field(
        default=64.0, gt=0, description="largest number of an update; more is cut off"
    )


class MainSettings(Section):
    """What `python main.py` has beside its groups."""

    num_clients: int = Field(
        default=5, ge=1, description="clients, each with its part of the images"
    )
    num_rounds: int = Field(default=7, ge=1, description="rounds of training and averaging")
    num_cpus: int | None = Field(
        default=None, ge=1, description="CPU cores per client process; null: shared out"
    )
    num_gpus: float | None = Field(
        default=None, ge=0, description="share of a GPU per client process; null: a whole one"
    )
    ray_address: str | None = Field(
        default=None, description="HOST:PORT of a Ray cluster; auto: the one on this machine"
    )
    quiet: bool = Field(default=False, description="show only results, failures and warnings")
    resume: str | None = Field(
        default=None, description="go on with the newest run, latest, or with a directory"
    )
    run: str | None = Field(
        default=None,
        description="with eval=federated: evaluate this run's encoder at the nodes, and train none",
    )
    participants: Partitions = Field(
        default=[], description="partitions that take part, as [0] for a client alone; []: all"
    )
    seed: int = Field(default=0, ge=0, le=LARGEST_SEED, description="decides every random choice")
    precision: Precision = PRECISION
    min_nodes: int | None = Field(
        default=None, ge=1, description="clients that a round waits for; null: num_clients"
    )
    nodes_file: str | None = Field(
        default=None, description="nodes.yaml, of the nodes that may join; null: any may"
    )
    node_wait_s: int = Field(default=600, ge=0, description="seconds to wait for them")
    round_timeout_s: int = Field(default=3600, gt=0, description="seconds to wait for replies")
    min_results: int = Field(
        default=1, ge=1, description="clients that must come back from a round"
    )
    max_update_ratio: float | None = Field(
        default=10,
        ge=1,
        description="reject updates so many times longer than the median's; null: none",
    )
    weighting: Literal["images", "equal"] = Field(
        default="images", description="what a client counts by in averages; equal: all alike"
    )
    max_weight_ratio: float | None = Field(
        default=10,
        ge=1,
        description="a client counts for so many times the median's images at most; null: for all",
    )
    wire: Literal["float32", "bfloat16", "int8", "int4"] = Field(
        default="float32",
        description="what weights are rounded to on their way, and what rounding takes from an "
        "update is sent with the next",
    )
    secure_aggregation: bool = Field(
        default=False, description="the server learns the sum of the updates and no single one"
    )
    secagg: SecureAggregation = Field(
        default=SecureAggregation(), description="how updates are masked"
    )
    held_out: float = Field(
        default=0.1, gt=0, le=0.5, description="share of a client's images for its loss"
    )
    evaluate_every: int = Field(
        default=1,
        ge=1,
        description="rounds from one evaluation to the next; the last has one, too",
    )
    keep_checkpoints: int = Field(
        default=3, ge=1, description="the newest so many stay, and the final one"
    )
    monitor: Monitor = Field(default=Monitor(), description="kNN accuracy at every evaluation")
    output_dir: str = Field(default="outputs", description="a run leaves its files below it")
    run_dir: str = Field(
        default="${output_dir}/${now:%Y-%m-%d}/${now:%H-%M-%S}", description="of this run"
    )
    cache_dir: str = CACHE_DIR


class TestSettings(Section):
    """What `python test.py` has beside the keys of the protocol."""

    run: str = Field(default=RUN, description="directory of a run of main.py")
    checkpoint: str | None = Field(
        default=None, description="or one file below a run's checkpoints/"
    )
    path: str | None = Field(default=None, description="the images, if they moved since training")
    precision: Precision = PRECISION
    quiet: bool = Field(default=False, description="show only results and warnings")
    cache_dir: str = CACHE_DIR


class EmbedSettings(Section):
    """What `python -m scripts.embed` has."""

    folder: str | None = Field(default=None, description="of images, at any depth")
    out: str = Field(default="features.parquet", description="where the features go")
    run: str = Field(default=RUN, description="directory of a run that has ended")
    encoder: str | None = Field(default=None, description="or one encoder.safetensors")
    neighbours: str | None = Field(
        default=None, description="a PNG file, for some images and those most similar to each"
    )
    batch_size: int = Field(default=256, ge=1, description="images encoded at once")
    precision: Precision = PRECISION


class PredictSettings(Section):
    """What `python -m scripts.predict` has."""

    folder: str | None = Field(default=None, description="of images, at any depth")
    out: str = Field(default="predictions.csv", description="where class and probability go")
    run: str = Field(default=RUN, description="directory of a run with a classifier.safetensors")
    classifier: str | None = Field(default=None, description="or one classifier.safetensors")
    neighbours: str | None = Field(
        default=None, description="a PNG file, for some images and those most similar to each"
    )
    batch_size: int = Field(default=256, ge=1, description="images encoded at once")
    precision: Precision = PRECISION


class ExportSettings(Section):
    """What `python -m scripts.export` has."""

    out: str = Field(default="encoder.onnx", description="where the network goes")
    run: str = Field(default=RUN, description="directory of a run that has ended")
    encoder: str | None = Field(
        default=None, description="or one encoder.safetensors or classifier.safetensors"
    )


class ReportSettings(Section):
    """What `python -m scripts.report` has beside the keys of the figures."""

    run: str = Field(default=RUN, description="directory of a run of main.py")
    path: str | None = Field(default=None, description="the images, if they moved since training")
    precision: Precision = PRECISION
    cache_dir: str = CACHE_DIR


@dataclass(frozen=True)
class Group:
    """A section of which conf/ has several options.

    Attributes:
        help: what the group decides.
        models: the schema of an option by the value of the key `told_by`; by "" for all.
    """

    help: str
    models: Mapping[str, type[Section]]
    told_by: str = "_target_"

    def model_of(self, section: Mapping[str, Any]) -> type[Section] | None:
        """Choose the schema of a section; None if it is of no option."""
        told = section.get(self.told_by)
        return self.models.get("") or (self.models.get(told) if isinstance(told, str) else None)


FLOWER = "flwr.serverapp.strategy"
PARTITIONER = "flwr_datasets.partitioner"
GROUPS = {
    "dataset": Group(
        "images, with views, training and head to suit",
        {
            "fedssl.data.sources.digits.DigitsSource": sections.Dataset,
            "fedssl.data.sources.hub.HubSource": sections.HubDataset,
            "fedssl.data.sources.folder.FolderSource": sections.FolderDataset,
        },
    ),
    "method": Group(
        "what the clients learn by",
        {
            "model.SimCLR": sections.SimCLR,
            "fedssl.methods.vicreg.VICReg": sections.VICReg,
            "fedssl.methods.barlow_twins.BarlowTwins": sections.BarlowTwins,
            "fedssl.methods.simsiam.SimSiam": sections.SimSiam,
            "fedssl.methods.moco.MoCo": sections.MoCo,
            "fedssl.methods.byol.BYOL": sections.BYOL,
        },
    ),
    "model": Group("encoder and projection head", {"": sections.Model}),
    "augment": Group("random views of an image", {"": sections.Augment}),
    "train": Group("how long clients train", {"": sections.Train}),
    "optimizer": Group(
        "what moves the weights", {"sgd": sections.Sgd, "muon": sections.Muon}, "name"
    ),
    "partition": Group(
        "how images are dealt out",
        {
            f"{PARTITIONER}.IidPartitioner": sections.IidPartition,
            f"{PARTITIONER}.DirichletPartitioner": sections.DirichletPartition,
            f"{PARTITIONER}.PathologicalPartitioner": sections.PathologicalPartition,
        },
    ),
    "strategy": Group(
        "how the server averages",
        {
            f"{FLOWER}.FedAvg": sections.Strategy,
            f"{FLOWER}.FedAdam": sections.FedAdam,
            f"{FLOWER}.FedAvgM": sections.FedAvgM,
            f"{FLOWER}.FedMedian": sections.Strategy,
            f"{FLOWER}.FedProx": sections.FedProx,
            f"{FLOWER}.FedTrimmedAvg": sections.FedTrimmedAvg,
            f"{FLOWER}.Krum": sections.Krum,
        },
    ),
    "privacy": Group(
        "what of a client the server's model may tell",
        {
            "none": sections.Privacy,
            "central": sections.CentralPrivacy,
            "adaptive": sections.AdaptivePrivacy,
        },
        "mechanism",
    ),
    "receive": Group(
        "how a client takes the averaged model",
        {
            "fedssl.training.receiving.Replace": sections.Replace,
            "fedssl.training.receiving.FedEMA": sections.FedEMA,
            "fedssl.training.receiving.FedU": sections.FedU,
        },
    ),
    "eval": Group(
        "how good the encoder is",
        {
            "fedssl.evaluation.linear.LinearEvaluation": sections.LinearEvaluation,
            "fedssl.sites.evaluation.FederatedEvaluation": sections.FederatedEvaluation,
            "fedssl.sites.finetune.FederatedFineTuning": sections.FederatedFineTuning,
            "fedssl.evaluation.finetune.FineTuning": sections.FineTuning,
            "fedssl.evaluation.supervised.SupervisedTraining": sections.SupervisedTraining,
        },
    ),
    "head": Group("head that suits the images", {"": sections.Head}),
    "figures": Group("pictures of the report", {"": sections.Figures}),
}


@dataclass(frozen=True)
class Program:
    """The settings of a program.

    Attributes:
        settings: the keys at the top.
        groups: the sections that are options of a group.
        at_top: a group whose keys stand at the top, too.
        optional: a group that need not be there.
        open: keys of `at_top` that may be null.
    """

    settings: type[Section]
    groups: tuple[str, ...] = ()
    at_top: str | None = None
    optional: str | None = None
    open: tuple[str, ...] = ()


PROGRAMS = {
    "config": Program(MainSettings, tuple(GROUPS)),
    "test": Program(
        TestSettings,
        at_top="eval",
        optional="dataset",
        open=("learning_rate", "weight_decay"),
    ),
    "embed": Program(EmbedSettings),
    "export": Program(ExportSettings),
    "predict": Program(PredictSettings),
    "report": Program(ReportSettings, at_top="figures"),
}


def store_defaults() -> None:
    """Hand every section's defaults to Hydra, for the defaults lists of conf/."""
    store = ConfigStore.instance()
    models = {model for group in GROUPS.values() for model in group.models.values()}
    for model in models | {program.settings for program in PROGRAMS.values()}:
        store.store(model.__name__, layout_of(model), group="schema")


store_defaults()
