"""Inject faults into real runs and show what came of each: fault, expected, seen.

    python -m benchmarks.robustness.faults --out results/faults.json

One simulation has a round for every way in which a client can fail or poison its
update, each by client 1 of 3; the others are small runs with damaged files, a
limit on file sizes, unreadable images, or two at once. The status is 1 if
anything was seen that was not expected.
"""

import argparse
import json
import shlex
import struct
import subprocess
import sys
import tempfile
import zlib
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from benchmarks.robustness.client_faults import CLIENT_FAULTS, SMALL, try_clients
from fedssl.env import ROOT
from fedssl.runs.provenance import provenance


def run_main(*arguments: object) -> tuple[int, str]:
    """Run main.py; give its status and all it says."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "main.py"), *map(str, arguments)],
        capture_output=True,
        text=True,
    )
    return done.returncode, done.stdout + done.stderr


def line_with(text: str, part: str) -> str:
    """Find the line that says something; else show the last."""
    lines = text.strip().splitlines() or ["no output"]
    return next((line.strip() for line in lines if part in line), f"NOT FOUND; {lines[-1]}")


def seen(fault: str, expected: str, status: int, text: str, wanted: int, part: str) -> dict:
    """Make a row out of how a run of main.py ended."""
    line = line_with(text, part)
    sound = status == wanted and "NOT FOUND" not in line and "Traceback" not in text
    return {
        "fault": fault,
        "expected": f"status {wanted}, {expected}",
        "seen": f"status {status}, {line}",
        "ok": sound,
    }


def flip(file: Path) -> None:
    """Flip a bit in the middle of a file."""
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def try_files(folder: Path) -> list[dict]:
    """Damage checkpoints and the cache between two parts of a run; limit file sizes."""
    table = []
    given = [*SMALL, f"output_dir={folder}", f"cache_dir={folder}/cache"]
    status, text = run_main(*given, "num_rounds=3")
    if status:
        raise SystemExit(text)
    saved = folder / "latest" / "checkpoints"

    def go_on(rounds: int, *more: object) -> tuple[int, str]:
        places = (f"output_dir={folder}", "resume=latest", f"num_rounds={rounds}")
        return run_main(*places, *more)

    newest = saved / "round-0003.safetensors"
    newest.write_bytes(newest.read_bytes()[:1000])
    found = go_on(4)
    say = "truncated or damaged"
    table.append(seen("checkpoint truncated", "said so, goes on before it", *found, 0, say))
    flip(saved / "round-0004.safetensors")
    found = go_on(5)
    table.append(
        seen("checkpoint with a flipped bit", "said so, goes on before it", *found, 0, say)
    )
    torch.save({"weight": torch.zeros(3)}, saved / "round-0005.safetensors")
    found = go_on(6)
    table.append(seen("checkpoint replaced by a pickle", "never loaded", *found, 0, say))
    (pixels,) = (folder / "cache").glob("digits-*/train.pixels")
    flip(pixels)
    found = go_on(7)
    table.append(seen("cache with a flipped bit", "built again", *found, 0, "is built again"))
    pixels.write_bytes(pixels.read_bytes()[:1000])
    found = go_on(8)
    table.append(seen("cache truncated", "built again", *found, 0, "is built again"))
    found = go_on(9, "min_results=4", "num_clients=3")
    table.append(seen("min_results above num_clients", "refused", *found, 2, "min_results=4"))
    return table


def try_full_disk(folder: Path) -> list[dict]:
    """Run on a file system with room for one checkpoint, then make room and resume.

    The file system lies in memory and in a mount namespace of its own.
    """
    disk, cache = folder / "disk", folder / "cache"
    disk.mkdir()
    main = [sys.executable, str(ROOT / "main.py"), f"output_dir={disk}"]
    first = shlex.join([*main, *SMALL, "num_rounds=2", f"cache_dir={cache}"])
    second = shlex.join([*main, "resume=latest"])
    script = f"""
        mount -t tmpfs -o size=200m tmpfs {disk} || exit
        head -c 130M /dev/zero > {disk}/filler
        {first} > {folder}/first 2>&1; echo $? > {folder}/first.status
        rm {disk}/filler
        {second} > {folder}/second 2>&1; echo $? > {folder}/second.status
    """
    subprocess.run(["unshare", "-rm", "sh", "-c", script], capture_output=True)
    if not (folder / "second.status").exists():
        print("not tried: a full disk, since nothing can be mounted here", flush=True)
        return []
    found = [
        (int((folder / f"{part}.status").read_text()), (folder / part).read_text())
        for part in ("first", "second")
    ]
    return [
        seen("disk full in round 2", "a clear line", *found[0], 1, "No space left on device"),
        seen("room again", "goes on after round 1", *found[1], 0, "after round 1"),
    ]


def try_two_at_once(folder: Path) -> list[dict]:
    """Start two runs with a cache to build and an output folder to share."""
    command = [sys.executable, str(ROOT / "main.py"), *SMALL, "num_rounds=1"]
    command += [f"output_dir={folder}", f"cache_dir={folder}/cache", f"run_dir={folder}/same"]
    runs = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for _ in range(2)
    ]
    texts = [run.communicate()[0] for run in runs]
    finished = sorted(file.parent.name for file in folder.glob("same*/results.json"))
    entries = [file.name for file in (folder / "cache").iterdir()]
    good = all(run.returncode == 0 for run in runs) and finished == ["same", "same-2"]
    return [
        {
            "fault": "two runs at once, one directory, one cache to build",
            "expected": "two directories, one cache entry",
            "seen": f"{finished}, {len(entries)} cache entry" if good else texts[0][-300:],
            "ok": good and len(entries) == 1,
        }
    ]


def bomb(width: int, height: int) -> bytes:
    """Make a PNG of a few bytes that claims to be enormous."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        checksum = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + checksum

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = zlib.compress(bytes(10_000))
    chunks = chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks


def try_images(folder: Path) -> list[dict]:
    """Train on a folder in which some images are broken in different ways."""
    photos = folder / "photos"
    photos.mkdir()
    draw = np.random.default_rng(0)
    for number in range(30):
        pixels = draw.integers(0, 256, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(photos / f"sound{number}.png")
    (photos / "bomb.png").write_bytes(bomb(60_000, 60_000))
    (photos / "empty.jpg").touch()
    whole = (photos / "sound0.png").read_bytes()
    (photos / "truncated.png").write_bytes(whole[: len(whole) // 2])
    given = ["dataset=imagefolder", f"dataset.path={photos}", "dataset.image_size=16"]
    found = run_main(
        *[s for s in SMALL if not s.startswith("num_clients")],
        *(*given, "num_clients=2", "num_rounds=1"),
        *(f"output_dir={folder}", f"cache_dir={folder}/cache"),
    )
    fault = "a decompression bomb, an empty and a truncated image"
    row = seen(fault, "counted and named", *found, 0, "3 unreadable files left out")
    row["ok"] &= all(name in row["seen"] for name in ("bomb.png", "empty.jpg", "truncated.png"))
    row["seen"] = row["seen"].replace(f"{photos}/", "")
    return [row]


PARTS = {
    "clients": try_clients,
    "files": try_files,
    "full disk": try_full_disk,
    "two at once": try_two_at_once,
    "images": try_images,
}


def main() -> None:
    """Inject, print the table, and write it with its provenance."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--faults", nargs="+", choices=CLIENT_FAULTS, default=list(CLIENT_FAULTS))
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    parts = PARTS | {"clients": partial(try_clients, names=given.faults)}
    measured, table = provenance(), []
    for part in given.parts:
        with tempfile.TemporaryDirectory() as folder:
            rows = parts[part](Path(folder).resolve())
        for row in rows:
            row["seen"] = row["seen"].replace(f"{Path(folder).resolve()}/", "")
            mark = "ok  " if row["ok"] else "FAIL"
            print(
                f"{mark} {row['fault']}\n       {row['expected']}\n       {row['seen']}", flush=True
            )
        table += rows
    if given.out:
        result = {
            "command": "python -m benchmarks.robustness.faults",
            "faults": table,
            "measured": measured,
        }
        given.out.write_text(json.dumps(result, indent=2) + "\n")
    sys.exit(0 if all(row["ok"] for row in table) else 1)


if __name__ == "__main__":
    main()
