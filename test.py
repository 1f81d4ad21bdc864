"""How good is the representation that a run has learned?

python test.py                          # linear evaluation of the newest run
python test.py run=outputs/DATE/TIME label_fraction=0.02 seeds=5
python test.py checkpoint=FILE
python test.py eval=finetune            # the encoder is tuned too
python test.py eval=supervised          # instead: the same network on the labels alone
python test.py dataset=imagefolder dataset.path=labelled label_fraction=1
"""

from fedssl.config.evaluation import choose_images, follow_run, refuse_preparation
from fedssl.config.help import answer

if __name__ == "__main__":
    answer("test", refuse_preparation)  # before the imports below, which take seconds

from pathlib import Path

from omegaconf import DictConfig

from fedssl.compute import choose_device
from fedssl.config.command_line import run_entry
from fedssl.data.image_set import ImageSet
from fedssl.errors import WARNING
from fedssl.evaluation.base import check_evaluable
from fedssl.files import check_replaceable
from fedssl.reporting.console import Waiting, make_report, print_results
from fedssl.runs.checkpoints import load_checkpoint
from fedssl.runs.directory import RunDirectory
from utils import evaluate_run, load_trained, name_of_images, open_images


def find_checkpoint(settings: DictConfig) -> tuple[RunDirectory, Path]:
    """Find what to evaluate: a given file, or the last checkpoint of a run.

    Raises:
        UserError: neither is there.
    """
    if settings.checkpoint:
        checkpoint = Path(settings.checkpoint).expanduser()
        load_checkpoint(checkpoint)  # says more about a wrong path than a missing run would
        return RunDirectory(checkpoint.resolve().parent.parent), checkpoint
    run = RunDirectory(Path(settings.run).expanduser().resolve())
    run.load_config()
    return run, run.last_checkpoint()


def prepare(settings: DictConfig) -> tuple[RunDirectory, DictConfig, ImageSet, Path]:
    """Open all that an evaluation needs, so that nothing fails after the work.

    Raises:
        UserError: a checkpoint, run or image set that can't be used.
    """
    run, checkpoint = find_checkpoint(settings)
    config = run.load_config()
    run.read_results()
    check_replaceable("run", str(run.results))
    config.precision, config.cache_dir = settings.precision, settings.cache_dir
    follow_run(settings, config)
    choose_images(config, settings)
    load_trained(config, checkpoint, choose_device())
    image_set = open_images(config, report=make_report(settings.quiet))
    check_evaluable(image_set, settings.label_fraction, config.seed, settings.seeds)
    return run, config, image_set, checkpoint


def evaluate(settings: DictConfig) -> None:
    """Evaluate a run as the command line asks; print and record the result."""
    run, config, image_set, checkpoint = prepare(settings)
    trained_on = load_checkpoint(checkpoint).images
    if "dataset" not in settings and trained_on not in (None, image_set.content):
        words = "the images differ from those that the run was trained on"
        make_report(settings.quiet)(f"{WARNING}{words}")
    if not settings.quiet:
        print(f"Evaluating {checkpoint} on {name_of_images(config.dataset)}\n")
    with Waiting("evaluation", settings.quiet):
        result = evaluate_run(run, config, settings, image_set, checkpoint)
    print_results(result.to_json())
    if not settings.quiet:
        print(f"Recorded in {run.results}")


if __name__ == "__main__":
    run_entry("test", prepare, evaluate, refuse_preparation)
