"""The directory of a run: the one place that writes what a run leaves behind."""

import json
import os
import secrets
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from itertools import chain, count
from pathlib import Path
from typing import IO, Any
from uuid import uuid4

from omegaconf import DictConfig, ListConfig, OmegaConf
from yaml import YAMLError

from fedssl.config.checks import check_settings
from fedssl.config.compose import to_mapping
from fedssl.config.moved import modernize, modernize_overrides
from fedssl.config.together import check_together
from fedssl.errors import UserError
from fedssl.files import write_atomically
from fedssl.networks.encoder import Encoder
from fedssl.runs.checkpoints import list_checkpoints
from fedssl.runs.encoder_file import CLASSIFIER_FILE, ENCODER_FILE, Classifier, pack_encoder
from fedssl.runs.metrics import RoundMetrics

try:
    import fcntl
except ImportError:  # there is none on Windows
    fcntl = None  # type: ignore[assignment]

LATEST = "latest"
# Without these it is not a run's configuration.
SECTIONS = ("dataset", "model", "augment", "partition", "eval", "num_clients", "num_rounds", "seed")


class RunDirectory:
    """Reads and writes the files of one run; each file is replaced as a whole."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"
        self.clients = self.checkpoints / "clients"  # what they keep, in a simulation
        self.metrics = path / "metrics.jsonl"
        self.results = path / "results.json"
        self.config = path / "config.yaml"
        self.overrides = path / "overrides.yaml"
        self.figures = path / "figures"
        self.report = path / "report.html"
        self._lock: IO[bytes] | None = None

    @classmethod
    def create(
        cls,
        path: Path,
        settings: Mapping[str, Any],
        output_dir: str,
        overrides: Sequence[str] = (),
    ) -> "RunDirectory":
        """Start a run's directory with its configuration; `latest` then points to it.

        A run that was started in the same second keeps the path; this one gets
        a number behind it.

        Args:
            settings: the whole configuration, as plain Python.
            output_dir: where `latest` is.
            overrides: of the command line, which a resumed run starts from.
        """
        run = cls(_claim(path.resolve()))
        run.lock()
        run.write_config(settings, overrides)
        _point_latest(Path(output_dir).expanduser().resolve() / LATEST, run.path)
        return run

    @property
    def identity(self) -> str:
        """Name this run among all runs, also after it was moved or resumed; 32 hex digits."""
        file = self.path / ".identity"
        if not file.is_file():
            write_atomically(file, uuid4().hex.encode())
        return file.read_text()

    def noise_key(self) -> bytes:
        """Give the secret that the noise of differential privacy is drawn by, 32 bytes.

        It is drawn by the operating system when it is first asked for. Whoever has it can take
        the noise away; once the run has ended for good, its file may be deleted.
        """
        file = self.path / ".noise-key"
        if not file.is_file():
            write_atomically(file, secrets.token_bytes(32))
        return file.read_bytes()

    def lock(self) -> None:
        """Keep other processes from going on with this run as long as this one lives.

        Raises:
            UserError: another process does already.
        """
        if fcntl is None or self._lock:
            return
        self._lock = (self.path / ".lock").open("wb")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(
                f"resume={self.path}: this run is still going on in another process; stop that "
                "one, or wait for its end"
            ) from error

    def write_config(self, settings: Mapping[str, Any], overrides: Sequence[str]) -> None:
        """Write the resolved configuration, and the overrides that led to it."""
        write_atomically(self.overrides, OmegaConf.to_yaml(list(overrides)).encode())
        write_atomically(self.config, OmegaConf.to_yaml(settings).encode())

    def load_config(self) -> DictConfig:
        """Read the configuration that the run was started with, in today's structure and keys.

        Raises:
            UserError: no such run, or its configuration is damaged.
        """
        remedy = "give the directory of a run of main.py"
        if not self.config.is_file():
            raise UserError(f"run={self.path}: no config.yaml there; {remedy}")
        try:
            config = OmegaConf.load(self.config)
            if not isinstance(config, DictConfig):
                raise ValueError("no mapping")
        except (OSError, ValueError, YAMLError) as error:
            raise UserError(f"{self.config}: can't be read ({error}); {remedy}") from error
        missing = [name for name in SECTIONS if name not in config]
        if missing:
            raise UserError(f"{self.config}: holds no {missing[0]!r}; {remedy}")
        try:
            config = modernize(config)
            check_settings("config", to_mapping(config))
            check_together(to_mapping(config))
        except (UserError, ValueError) as error:
            raise UserError(f"{self.config}: {error}; {remedy}") from error
        return config

    def read_overrides(self) -> list[str]:
        """Read the overrides that the run was started with, under today's names.

        There are none if the run did not keep them.

        Raises:
            UserError: the file is damaged.
        """
        if not self.overrides.is_file():
            return []
        try:
            overrides = OmegaConf.load(self.overrides)
            if not isinstance(overrides, ListConfig):
                raise ValueError("no list")
        except (OSError, ValueError, YAMLError) as error:
            raise UserError(
                f"{self.overrides}: damaged ({error}); put what the run was started with there, "
                "a line each, as in `- num_rounds=3`"
            ) from error
        return modernize_overrides(list(map(str, overrides)))[0]

    def write_metrics(self, rounds: Sequence[RoundMetrics]) -> None:
        """Write metrics.jsonl, a line a round."""
        lines = [json.dumps(metrics.to_json()) + "\n" for metrics in rounds]
        write_atomically(self.metrics, "".join(lines).encode())

    def append_metrics(self, metrics: RoundMetrics) -> None:
        """Add a round's line to metrics.jsonl."""
        self.write_metrics([*self.read_metrics(), metrics])

    def read_metrics(self) -> list[RoundMetrics]:
        """Read metrics.jsonl, none before the first round is finished.

        Raises:
            UserError: a line is damaged, or is something else.
        """
        if not self.metrics.is_file():
            return []
        rounds = []
        for number, text in enumerate(self.metrics.read_bytes().splitlines(), start=1):
            where = f"{self.metrics}: line {number}"
            try:
                line = json.loads(text)
            except ValueError as error:
                raise UserError(f"{where} is damaged ({error}); take the line out") from error
            try:
                rounds.append(RoundMetrics.from_json(line))
            except ValueError as error:
                raise UserError(f"{where} is no round of a run; take the line out") from error
        return rounds

    def last_checkpoint(self) -> Path:
        """Find the newest checkpoint.

        Raises:
            UserError: the run has none.
        """
        files = list_checkpoints(self.checkpoints)
        if not files:
            raise UserError(
                f"run={self.path}: no checkpoint; a run leaves the first after its first round"
            )
        return files[-1]

    def save_encoder(self, encoder: Encoder, image_size: int, dataset: str, rounds: int) -> None:
        """Write the encoder alone; see `pack_encoder`."""
        write_atomically(
            self.path / ENCODER_FILE, pack_encoder(encoder, image_size, dataset, rounds)
        )

    def save_classifier(
        self,
        encoder: Encoder,
        image_size: int,
        dataset: str,
        rounds: int,
        classifier: Classifier,
    ) -> None:
        """Write the encoder with a classifier on it; see `pack_encoder`."""
        data = pack_encoder(encoder, image_size, dataset, rounds, classifier)
        write_atomically(self.path / CLASSIFIER_FILE, data)

    def add_result(self, result: Mapping[str, Any]) -> None:
        """Append an evaluation to results.json, which keeps them all, also two at the same time."""
        with _alone_in(self.path):
            text = json.dumps([*self.read_results(), result], indent=2)
            write_atomically(self.results, text.encode())

    def read_results(self) -> list[dict[str, Any]]:
        """Read the evaluations so far.

        Raises:
            UserError: the file is damaged.
        """
        if not self.results.is_file():
            return []
        try:
            results = json.loads(self.results.read_bytes())
            if not isinstance(results, list):
                raise ValueError("no list")
            for number, result in enumerate(results, start=1):
                if not isinstance(result, dict) or not isinstance(result.get("rows"), list):
                    raise ValueError(f"entry {number} is no evaluation")
            return results
        except (ValueError, OSError, RecursionError) as error:
            raise UserError(
                f"{self.results}: damaged ({error}); move it away and evaluate again"
            ) from error


@contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Wait until no other process is here with the same folder, and keep others waiting."""
    with ExitStack() as opened:
        if fcntl is not None:
            descriptor = os.open(folder, os.O_RDONLY)
            opened.callback(os.close, descriptor)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield


def _claim(path: Path) -> Path:
    """Make a directory for a run and no other: PATH, else PATH-2, PATH-3, ..."""
    for place in chain([path], (path.with_name(f"{path.name}-{n}") for n in count(2))):
        with suppress(FileExistsError):
            place.mkdir(parents=True, exist_ok=True)  # Hydra makes it, too
            (place / "checkpoints").mkdir()
            break
    return place


def _point_latest(link: Path, run: Path) -> None:
    temporary = link.with_name(f".{LATEST}.{uuid4().hex[:8]}")
    link.parent.mkdir(parents=True, exist_ok=True)
    try:
        temporary.symlink_to(os.path.relpath(run, link.parent), target_is_directory=True)
        os.replace(temporary, link)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise UserError(
            f"output_dir={link.parent}: {link.name} can't be a link to the newest run "
            f"({error.strerror}); move what is there, or give another output_dir"
        ) from error
