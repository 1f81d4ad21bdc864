"""The schema of the groups of conf/: images, network, training, federation, evaluation."""

from typing import Literal

from pydantic import Field

from fedssl.config.fields import (
    Deviations,
    Instance,
    Means,
    Section,
    Shares,
    ShareSpan,
    Sides,
    Span,
    Stages,
)

LARGEST_SEED = 2**31 - 1


class Dataset(Instance):
    """What every source of images has."""

    name: str | None = Field(description="how messages, tables and pictures call it")
    path: str | None = Field(default=None, description="a folder on this machine")
    image_size: int = Field(ge=4, le=4096, description="side of the images in pixels")
    mean: Means = Field(description="of the channels, which the network subtracts")
    std: Deviations = Field(description="of the channels, which the network divides by")
    test_fraction: float | None = Field(
        gt=0, le=0.9, description="share of labelled training images for a test, if there is none"
    )


class HubDataset(Dataset):
    """A data set of the Hugging Face hub."""

    path: str | None = Field(default=None, description="a local copy of the hub's files instead")
    hub_name: str | None = Field(description="OWNER/NAME on the hub")
    revision: str | None = Field(default=None, description="of the hub's files; null: the newest")
    config_name: str | None = Field(
        default=None, description="which of several configurations; null: the only one"
    )
    image_column: str = Field(default="image", description="column of the images")
    label_column: str | None = Field(
        default="label", description="column of the labels; null: no labels"
    )
    train_split: str = Field(default="train", description="split to train on")
    test_split: str | None = Field(
        default="test", description="split to test on; null: test_fraction"
    )


class FolderDataset(Dataset):
    """A folder of one's own images."""

    path: str | None = Field(default=None, description="the folder")
    labels: bool = Field(default=True, description="false: class folders are mere folders")


class Model(Section):
    """The network."""

    encoder: Literal["resnet18", "resnet50"] = Field(description="which ResNet")
    stem: Literal["auto", "conv3x3_stride1", "conv3x3_stride2", "imagenet"] = Field(
        default="auto", description="its first layers; auto: by the images' size"
    )
    norm: Literal["batch", "group"] = Field(
        default="batch",
        description="what normalizes: batch, by all images of a step, with statistics that "
        "travel; group, each image by itself",
    )
    projection_hidden: int = Field(default=512, ge=1, description="width inside the head")
    projection_size: int = Field(default=128, ge=1, description="numbers that the loss compares")
    deep_supervision: Stages = Field(
        default=[], description="earlier stages with a loss of their own, as [layer2,layer3]"
    )


class Method(Instance):
    """What all methods of self-supervision have."""

    projection_hidden: int = Field(ge=1, description="width inside the head")
    projection_size: int = Field(ge=1, description="numbers that the loss compares")
    deep_supervision: Stages = Field(description="earlier stages with a loss of their own")


class SimCLR(Method):
    """SimCLR."""

    temperature: float = Field(default=0.3, gt=0, description="of the NT-Xent loss")
    shared_negatives: float = Field(
        default=0.0,
        ge=0,
        le=64,
        description="negatives of other clients for each view, drawn by the moments of their "
        "projections, once global_statistics_from is reached; 0: none",
    )


class VICReg(Method):
    """VICReg, with the weights of its paper."""

    invariance: float = Field(default=25.0, ge=0, description="weight: views of an image agree")
    variance: float = Field(default=25.0, ge=0, description="weight: each number varies")
    covariance: float = Field(default=1.0, ge=0, description="weight: none follows another")


class BarlowTwins(Method):
    """Barlow Twins."""

    redundancy: float = Field(
        default=0.005, ge=0, description="weight of the correlations between different numbers"
    )
    scale: float = Field(default=0.1, gt=0, description="of the whole loss")


class SimSiam(Method):
    """SimSiam."""


class MoCo(Method):
    """MoCo v2."""

    temperature: float = Field(default=0.2, gt=0, description="of the InfoNCE loss")
    momentum: float = Field(default=0.99, ge=0, le=1, description="of the key encoder")
    queue_size: int = Field(
        default=256, ge=1, description="keys of earlier batches; at most a client's images"
    )


class BYOL(Method):
    """BYOL."""

    momentum: float = Field(
        default=0.99, ge=0, le=1, description="of the target network at first; it rises to 1"
    )
    share_target: bool = Field(
        default=False, description="average the target networks, too, for twice the bytes"
    )


class Augment(Section):
    """What the two views of an image are made by."""

    crop_scale: ShareSpan = Field(default=[0.2, 1.0], description="share of the image's area")
    crop_ratio: Span = Field(
        default=[0.75, 1.3333333333333333], description="width / height of the crop"
    )
    flip: float = Field(default=0.5, ge=0, le=1, description="probability of a mirror image")
    rotation: int = Field(default=0, ge=0, le=180, description="degrees, to both sides")
    shear: float = Field(
        default=0.0, ge=0, le=2, description="pixels per pixel of height, to both sides"
    )
    jitter: float = Field(default=0.8, ge=0, le=1, description="probability of other colours")
    brightness: float = Field(default=0.4, ge=0, description="how much it changes then")
    contrast: float = Field(default=0.4, ge=0, description="how much it changes then")
    saturation: float = Field(default=0.4, ge=0, description="how much it changes then")
    hue: float = Field(default=0.1, ge=0, le=0.5, description="how much it changes then")
    grayscale: float = Field(default=0.1, ge=0, le=1, description="probability of no colours")
    blur: float = Field(default=0.0, ge=0, le=1, description="probability of a blur")
    blur_sigma: Span = Field(default=[0.1, 2.0], description="width of the blur in pixels")


class Train(Section):
    """How long a client trains in a round, and on views of what size."""

    local_epochs: int = Field(default=1, ge=1, description="passes over a client's images a round")
    batch_size: int = Field(default=128, ge=2, description="images per step")
    max_steps: int = Field(
        default=0, ge=0, description="steps per client and round, at most; 0: no limit"
    )
    round_fractions: Shares = Field(
        default=[],
        description="shares of these steps, each for an equal part of the run, as [0.2,1]",
    )
    train_resolutions: Sides = Field(
        default=[],
        description="side of the views in pixels, each for an equal part of the run, as "
        "[16,24,32]; []: the images' size",
    )
    eval_resolution: int | None = Field(
        default=None,
        ge=4,
        le=4096,
        description="side in pixels of the whole images that the encoder is used on; null: as "
        "its last views",
    )
    statistics: Literal["averaged", "recomputed"] = Field(
        default="averaged",
        description="BatchNorm's, of the averaged model: averaged too, or recomputed over images "
        "of the clients, which takes a message more",
    )
    global_statistics_from: float = Field(
        default=1.0,
        ge=0,
        le=1,
        description="share of the run after which training, too, normalizes by BatchNorm's "
        "statistics of the federation instead of a batch's; 1: never",
    )


class Sgd(Section):
    """SGD with momentum."""

    name: str = Field(description="sgd, or muon: Muon for matrices, SGD for the rest")
    learning_rate: float = Field(
        default=0.06, gt=0, description="of SGD at its peak; falls along a cosine over the run"
    )
    momentum: float = Field(default=0.9, ge=0, le=0.9999, description="of SGD")
    weight_decay: float = Field(default=5.0e-4, ge=0, description="of SGD")
    momentum_start: Literal["zero", "averaged"] = Field(
        default="zero",
        description="momentum at the start of a round: zero, or averaged, the mean of what the "
        "clients ended the last one with, which travels like the weights",
    )


class Muon(Sgd):
    """Muon for all matrices and convolutions behind the first, SGD for the rest."""

    muon_learning_rate: float = Field(
        default=0.05, gt=0, description="of Muon at its peak, with the same cosine"
    )
    muon_momentum: float = Field(default=0.95, ge=0, le=0.9999, description="of Muon")


class IidPartition(Instance):
    """Images dealt out at random."""


class DirichletPartition(Instance):
    """Shares of the classes drawn from a Dirichlet distribution."""

    partition_by: Literal["label", "class_group"] = Field(
        default="label", description="what is dealt out unequally"
    )
    alpha: float = Field(default=0.5, gt=0, description="smaller: more unequal")
    min_partition_size: int = Field(
        default=10, ge=0, description="images that a client has, at least"
    )
    self_balancing: bool = Field(default=False, description="give less to clients with many images")
    seed: int = Field(ge=0, le=LARGEST_SEED, description="of the draw")


class PathologicalPartition(Instance):
    """A few classes for each client."""

    classes_per_client: int = Field(default=2, ge=1, description="classes that a client sees")
    partition_by: Literal["label", "class_group"] = Field(
        default="class_group", description="what is dealt out"
    )
    num_classes_per_partition: int = Field(default=1, ge=1, description="groups for each client")
    class_assignment_mode: Literal["deterministic", "first-deterministic", "random"] = Field(
        default="deterministic", description="in which order groups are dealt out"
    )
    seed: int = Field(ge=0, le=LARGEST_SEED, description="of the draw")


class Replace(Instance):
    """As it is."""


class FedEMA(Instance):
    """Mixed with the client's own, by how far they are apart."""

    first_share: float = Field(
        default=0.7, ge=0, le=1, description="of the client's own, when it first comes back"
    )


class FedU(Instance):
    """As it is, but for predictors where the encoders are far apart."""

    threshold: float = Field(
        default=0.1, ge=0, description="distance of the encoders, as a share of their length"
    )


class Strategy(Instance):
    """How the server combines what the clients send; FedAvg has no more than this."""

    acts_on: Literal["parameters", "floats"] = Field(
        description="what it combines; the rest is averaged"
    )
    fraction_train: float = Field(
        default=1.0, gt=0, le=1, description="share of the clients that train in a round"
    )
    fraction_evaluate: float = Field(
        default=1.0, gt=0, le=1, description="share of the clients that evaluate in a round"
    )


class FedAdam(Strategy):
    """Adam on the server."""

    eta: float = Field(
        default=0.01, gt=0, description="server's learning rate: how far a weight moves, about"
    )
    beta_1: float = Field(default=0.9, ge=0, lt=1, description="memory of the mean")
    beta_2: float = Field(default=0.99, ge=0, lt=1, description="memory of the variance")
    tau: float = Field(default=0.001, gt=0, description="keeps small variances from large steps")


class FedAvgM(Strategy):
    """Momentum on the server."""

    server_learning_rate: float = Field(default=1.0, gt=0, description="1: the average itself")
    server_momentum: float = Field(default=0.5, ge=0, lt=1, description="memory of earlier rounds")


class FedProx(Strategy):
    """Clients held near the model of the round's start."""

    proximal_mu: float = Field(default=0.01, ge=0, description="how strongly; 0: as FedAvg")


class FedTrimmedAvg(Strategy):
    """An average without the extremes."""

    beta: float = Field(default=0.2, ge=0, lt=0.5, description="share cut off at each end")


class Krum(Strategy):
    """The update that is nearest to the others."""

    num_malicious_nodes: int = Field(default=1, ge=0, description="clients that may be hostile")


class Privacy(Section):
    """None: the server sees every update."""

    mechanism: str = Field(description="none, central or adaptive")


class NoisedPrivacy(Privacy):
    """What both ways of differential privacy have."""

    noise_multiplier: float = Field(
        default=1.0, gt=0, description="noise on the sum of the updates, in clipping norms"
    )
    clipping_norm: float = Field(
        default=1.0,
        gt=0,
        description="length of an update, at most; at first if adaptive",
    )
    delta: float = Field(
        default=1.0e-5, gt=0, lt=1, description="probability at which epsilon need not hold"
    )
    max_epsilon: float | None = Field(
        default=None, gt=0, description="no round begins that would exceed it; null: no limit"
    )


class CentralPrivacy(NoisedPrivacy):
    """Differential privacy of clients: the server clips updates and adds noise to their mean."""

    clipping: Literal["server", "client"] = Field(
        default="server", description="who clips: server, or client before anything leaves it"
    )


class AdaptivePrivacy(NoisedPrivacy):
    """The same, clipped by a length that follows the updates."""

    target_quantile: float = Field(
        default=0.5, ge=0, le=1, description="share of the updates that are short enough"
    )
    clip_rate: float = Field(default=0.2, gt=0, description="how fast the length gets there")
    count_noise: float | None = Field(
        default=None,
        gt=0,
        description="noise on the number of short updates; null: a twentieth of the clients of a "
        "round, and at least noise_multiplier",
    )


class Head(Section):
    """What suits a linear head over these images; eval=linear and eval=finetune use it."""

    learning_rate: float = Field(default=0.03, gt=0, description="on standardized features")
    weight_decay: float = Field(default=0.1, ge=0, description="less with thousands of labels")


class Evaluation(Instance):
    """What all protocols have."""

    label_fraction: float = Field(
        default=0.1, gt=0, le=1, description="share of the training labels, stratified"
    )
    seeds: int = Field(default=3, ge=1, description="draws of labels, for mean and spread")
    baselines: bool = Field(
        default=True, description="beside it: a random encoder and the raw pixels"
    )
    feature_batch_size: int = Field(default=256, ge=1, description="images encoded at once")


class LinearEvaluation(Evaluation):
    """A linear head on the frozen encoder."""

    epochs: int = Field(default=20, ge=1, description="of the head's training")
    batch_size: int = Field(default=16, ge=1, description="labelled images per step")
    learning_rate: float = Field(gt=0, description="of the head, on standardized features")
    weight_decay: float = Field(ge=0, description="of the head")
    knn_neighbors: int = Field(default=10, ge=1, description="of the kNN beside it")


class EvaluationAtSites(Evaluation):
    """Labels stay at the sites."""

    batch_size: int = Field(default=16, ge=1, description="labelled images per step")
    learning_rate: float = Field(gt=0, description="of a head that is trained by rounds")
    weight_decay: float = Field(ge=0, description="of that head")
    min_images: int = Field(
        default=2, ge=1, description="of a class at a site, for its sum to leave the site"
    )
    folds: int = Field(default=10, ge=2, description="of sites, which choose the decay from sums")


class FederatedEvaluation(EvaluationAtSites):
    """Labels stay at the sites: heads from sums and by rounds, scored where the images are."""

    epochs: int = Field(default=20, ge=1, description="rounds of the head that FedAvg trains")


class FederatedFineTuning(EvaluationAtSites):
    """Labels stay at the sites, which tune the encoder with its head by FedAvg."""

    rounds: int = Field(default=5, ge=1, description="of FedAvg")
    epochs: int = Field(
        default=4, ge=1, description="passes over the labelled images of each site in a round"
    )
    learning_rate: float = Field(default=0.001, gt=0, description="of the head")
    encoder_learning_rate: float = Field(default=0.001, gt=0, description="of the encoder")


class FineTuning(LinearEvaluation):
    """The encoder tuned together with its head."""

    encoder_learning_rate: float = Field(default=0.001, gt=0, description="of the encoder")


class SupervisedTraining(Evaluation):
    """The whole network trained from scratch on the labels alone."""

    epochs: int = Field(default=60, ge=1, description="of the training from scratch")
    batch_size: int = Field(default=64, ge=2, description="labelled images per step")
    learning_rate: float = Field(default=0.02, gt=0, description="of the whole network")
    weight_decay: float = Field(default=5.0e-4, ge=0, description="of the whole network")


class Figures(Section):
    """Pictures of the report."""

    map_images: int = Field(
        default=500, ge=2, description="test images on the map and among the neighbours, at most"
    )
    perplexity: int = Field(default=30, ge=1, description="of t-SNE: neighbours kept near")
    queries: int = Field(default=10, ge=1, description="images whose neighbours are shown")
