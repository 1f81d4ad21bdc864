"""Write the page of a run again.

python -m scripts.report                          # the newest run
python -m scripts.report --run=outputs/DATE/TIME
python -m scripts.report path=DIR                 # its images have moved
"""

from fedssl.config.help import answer

if __name__ == "__main__":
    answer("report")  # before the imports below, which take seconds


from pathlib import Path

from omegaconf import DictConfig

from fedssl.config.command_line import run_entry
from fedssl.data.image_set import ImageSet
from fedssl.errors import UserError
from fedssl.reporting.page import read_rounds
from fedssl.runs.directory import RunDirectory
from utils import open_images, open_source, report_run


def prepare(settings: DictConfig) -> tuple[RunDirectory, DictConfig, ImageSet | None]:
    """Open all that a report needs.

    Raises:
        UserError: a run or image set that can't be used.
    """
    run = RunDirectory(Path(settings.run).expanduser().resolve())
    config = run.load_config()
    read_rounds(run)
    run.last_checkpoint()
    config.precision, config.cache_dir = settings.precision, settings.cache_dir
    if settings.path:
        config.dataset.path = settings.path
    if not open_source(config.dataset).is_here:
        return run, config, None  # each client had a folder of its own
    try:
        return run, config, open_images(config, print)
    except UserError as error:
        raise UserError(f"{error}; if the images have moved, add path=DIR") from error


def report(settings: DictConfig) -> None:
    """Write the report of a run as the command line asks."""
    run, config, image_set = prepare(settings)
    report_run(run, config, settings, image_set)
    print(f"Written to {run.report}")


if __name__ == "__main__":
    run_entry("report", prepare, report)
