"""How the settings of an evaluation and those of the run that it evaluates go together."""

from collections.abc import Sequence

from omegaconf import DictConfig, OmegaConf

from fedssl.config.fields import defaults_of
from fedssl.config.options import model_of_option
from fedssl.config.schema import GROUPS
from fedssl.errors import UserError

PREPARATION = ("image_size", "mean", "std")  # of images for an encoder
OPEN = ("learning_rate", "weight_decay")  # null in conf/test.yaml


def refuse_preparation(arguments: Sequence[str]) -> list[str]:
    """Pass the arguments on, unless they would prepare images otherwise than the encoder's.

    Raises:
        UserError: they would.
    """
    for argument in arguments:
        key = argument.partition("=")[0]
        if key in [f"dataset.{name}" for name in PREPARATION]:
            raise UserError(
                f"{argument}: is that of the run which trained the encoder; leave it out"
            )
    return list(arguments)


def choose_images(config: DictConfig, settings: DictConfig) -> None:
    """Put the images that are evaluated into the configuration of the run, in place.

    Raises:
        UserError: both `path` and `dataset` are given.
    """
    if "dataset" in settings:
        if settings.path:
            raise UserError(f"path={settings.path}: with dataset= give dataset.path instead")
        kept = {name: config.dataset[name] for name in PREPARATION}
        config.dataset = OmegaConf.merge(settings.dataset, kept)
    elif settings.path:
        config.dataset.path = settings.path


def follow_run(settings: DictConfig, config: DictConfig) -> None:
    """Train the head as the run did where the settings leave that open, in place.

    Protocols without rates of their own share the head's. Another protocol
    than the run's has its own rates, or those of the run's head.
    """
    own, of_run = _own_rates(settings._target_), _own_rates(config.eval._target_)
    for key in OPEN:
        if settings[key] is None and (settings._target_ == config.eval._target_ or own == of_run):
            settings[key] = config.eval[key]
        elif settings[key] is None:
            settings[key] = own.get(key, config.head[key])


def _own_rates(target: str) -> dict[str, float]:
    """Give the rates that a protocol brings along; none if it follows the head's."""
    model = GROUPS["eval"].models.get(target) or model_of_option("eval", target)
    defaults = defaults_of(model) if model else {}
    return {key: defaults[key] for key in OPEN if key in defaults}
