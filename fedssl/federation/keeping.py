"""What a client keeps for itself from round to round, in files or else in Flower's context.

From the files a client that left and came back, and a run that is resumed, go on with the same
bytes. They lie below `partition-3/round-0002.safetensors`, in a simulation in the run's
`checkpoints/clients/`, at a node in its own cache. Nothing of them ever travels. `context.state`
serves where there is no folder: it would be in memory once for each virtual client, and a node's
process has five seconds to hand it back as it ends, too few for a large model beside other work.
"""

import os
import shutil
import time
from collections.abc import Collection
from pathlib import Path

from flwr.app import ArrayRecord, Context, RecordDict
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from fedssl.errors import UserError
from fedssl.files import write_atomically
from fedssl.runs.directory import RunDirectory

KEPT = "kept"  # in `context.state`
LEFT = "left"  # what rounding has left of updates: its record in the state, and its folder
RUNS = 3  # whose arrays a node keeps, however old; and those of all that were asked lately
LATELY_S = 7 * 24 * 3600


class Keeping:
    """The arrays that one client keeps."""

    def __init__(
        self, context: Context, folder: Path | None, keep_rounds: int, name: str = KEPT
    ) -> None:
        """Look for nothing yet.

        Args:
            context: whose state keeps it if there is no folder.
            folder: of this client in this run; None for no files.
            keep_rounds: checkpoints that a run keeps, from any of which it may go on.
            name: of the record in the context's state.
        """
        self.state = RecordDict() if folder else context.state
        self.folder, self.keep_rounds, self.name = folder, keep_rounds, name

    def read(self, last_round: int) -> dict[str, Tensor]:
        """Give the arrays as this client's last training left them; none before its first.

        Args:
            last_round: files of later rounds are of a run that was broken off.

        Raises:
            UserError: the file is damaged.
        """
        if kept := self.state.array_records.get(self.name):
            return dict(kept.to_torch_state_dict())
        earlier = [file for file in self._files() if round_of(file) <= last_round]
        if not earlier:
            return {}
        try:
            return load_file(earlier[-1])
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"{earlier[-1]}: damaged ({error}); start a new run",
                public="what it keeps for this run is damaged; start a new run",
            ) from error

    def write(self, round_number: int, arrays: dict[str, Tensor]) -> None:
        """Keep arrays, with nothing else of this client than what resuming may need."""
        if self.folder is None:
            self.state[self.name] = ArrayRecord(arrays)
            return
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        data = save({name: value.cpu().contiguous() for name, value in arrays.items()})
        write_atomically(self.folder / f"round-{round_number:04d}.safetensors", data)
        for file in superfluous(self._files(), round_number - self.keep_rounds):
            file.unlink(missing_ok=True)

    def _files(self) -> list[Path]:
        """List the files of this client, oldest first."""
        found = self.folder.glob("round-*.safetensors") if self.folder else ()
        return sorted(found, key=round_of)


def superfluous(files: Collection[Path], oldest: int) -> list[Path]:
    """List the files, oldest first, that a run which goes on after `oldest` or later can't need."""
    return [file for file in files if round_of(file) <= oldest][:-1]


def round_of(file: Path) -> int:
    """Read the number of a file's round."""
    number = file.stem.rpartition("-")[2]
    return int(number) if number.isdecimal() else 0


def folder_of(clients: Path, partition: int) -> Path:
    """Give the place of a client's files below the folder of all clients of a run."""
    return clients / f"partition-{partition}"


def folder_at_node(cache: Path, run: str) -> Path:
    """Give the folder of a run's clients at a node, and drop those of long-gone runs.

    Other nodes on this machine may do the same at the same time.
    """
    clients = cache / "clients"
    own = clients / run
    if new := not own.is_dir():
        own.mkdir(parents=True, mode=0o700, exist_ok=True)
    os.utime(own)
    if new:
        used = {folder: _last_use(folder) for folder in clients.iterdir()}
        newest = sorted(used, key=used.__getitem__)
        for folder in newest[:-RUNS]:
            if used[folder] < time.time() - LATELY_S:
                shutil.rmtree(folder, ignore_errors=True)
    return own


def _last_use(folder: Path) -> float:
    """Tell when a run's folder was last asked for; now, where another node has just dropped it."""
    try:
        return folder.stat().st_mtime
    except FileNotFoundError:
        return time.time()


def check_kept(run: RunDirectory, done: int, part: str = ".") -> None:
    """Make sure that a simulation which is to go on has what its clients kept.

    Args:
        done: the round after which it goes on.
        part: the folder below that of a client: LEFT for what rounding has left.

    Raises:
        UserError: a client's file is missing.
    """
    rounds = [metrics for metrics in run.read_metrics() if metrics.round <= done]
    trained = {c.partition for m in rounds for c in m.clients if c.num_examples is not None}
    for partition in sorted(trained):
        folder = folder_of(run.clients, partition) / part
        if not any(round_of(file) <= done for file in folder.glob("round-*.safetensors")):
            raise UserError(
                f"resume={run.path}: {folder} lacks what this client kept by round {done}; on a "
                "Ray cluster all machines must share the run's directory"
            )
