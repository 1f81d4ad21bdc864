"""Any set of runs as a table (Markdown and CSV) and a plot with spread.

python -m scripts.compare outputs/2026-11-22
python -m scripts.compare outputs --x=num_clients --metric="kNN, 10 %" --out=clients
"""

import argparse
from pathlib import Path

from fedssl.config.command_line import one_line
from fedssl.errors import UserError
from fedssl.files import check_replaceable, write_atomically
from fedssl.reporting.comparison import (
    MAIN_METRIC,
    SEED,
    draw_comparison,
    find_runs,
    gather,
    summarize,
    to_markdown,
)


def main() -> None:
    """Gather the runs that the command line names; print and write the comparison."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path, help="runs, or directories above them")
    parser.add_argument("--out", type=Path, default=Path("comparison"), help="without extension")
    parser.add_argument("--metric", default=MAIN_METRIC, help="what the plot shows")
    parser.add_argument("--x", help="the setting below the plot; default: the first that differs")
    given = parser.parse_args()
    if given.out.name in ("", ".."):
        raise UserError(f"--out={given.out}: names no file; give a name without extension")
    check_replaceable("--out", f"{given.out}.md")
    frame, settings, empty = gather(find_runs(given.runs))
    for run in empty:
        print(f"left out: {run.path} has no evaluation; run python test.py --run={run.path}")
    if frame.empty:
        raise UserError("none of these runs has been evaluated")
    scores = [column for column in frame if column not in (*settings, SEED)]
    for flag, value, known in (("metric", given.metric, scores), ("x", given.x, settings)):
        if value is not None and value not in known:
            raise UserError(f"--{flag}={value}: not among these runs; known: {', '.join(known)}")
    if given.x:
        settings = [given.x, *(name for name in settings if name != given.x)]
    table = summarize(frame, settings)
    markdown = to_markdown(table)
    files = {end: given.out.with_name(f"{given.out.name}.{end}") for end in ("md", "csv", "png")}
    try:
        write_atomically(files["md"], markdown.encode())
        write_atomically(files["csv"], frame.to_csv(index=False).encode())
        draw_comparison(frame, settings, given.metric, files["png"])
    except OSError as error:
        raise RuntimeError(f"can't write {given.out}: {error.strerror}") from error
    print(f"\n{markdown}\nWritten: {given.out}.md, .csv (a line a run), .png")


if __name__ == "__main__":
    with one_line():
        main()
