"""What many clients cost: start, rounds and memory over their number, with ten in each round.

    python -m benchmarks.performance.scale --path cifar10-parquet --out results/clients.json

Every client that takes part trains one step, of as many images with 10 clients as with
10,000, who have five each. The last run is on a Ray cluster of two nodes on this machine.
"""

import argparse
import json
import re
from pathlib import Path
from typing import Any

from benchmarks.performance.simulation import measure
from fedssl.compute import count_cores
from fedssl.runs.provenance import provenance

COUNTS = (10, 100, 1_000, 10_000)
A_ROUND = 10
SETTINGS = ["model.stem=imagenet", "train.max_steps=1", "train.batch_size=4", "held_out=0.2"]
SETTINGS += ["num_rounds=6", "eval.baselines=false", "figures.map_images=10"]


def overrides_for(count: int) -> list[str]:
    """Let ten of so many clients take part in a round."""
    share = A_ROUND / count
    fractions = [f"strategy.fraction_{kind}={share:g}" for kind in ("train", "evaluate")]
    return [f"num_clients={count}", *fractions, *SETTINGS]


def on_cluster(path: str, count: int) -> dict[str, Any]:
    """Measure on two nodes of Ray, each with half of the cores."""
    from ray.cluster_utils import Cluster  # reads what fedssl.env has set when it is imported

    each = max(1, count_cores() // 2)
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": each})
    try:
        cluster.add_node(num_cpus=each)
        return measure(path, overrides_for(count), cluster.address)
    finally:
        cluster.shutdown()


def main() -> None:
    """Measure, print, and write everything with its provenance."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--path", required=True, help="a local copy of uoft-cs/cifar10")
    parser.add_argument("--counts", nargs="+", type=int, default=COUNTS)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    rows = []
    for count in given.counts:
        rows.append({"clients": count, "ray_nodes": 1, **measure(given.path, overrides_for(count))})
        print(json.dumps(rows[-1]), flush=True)
    rows.append({"clients": count, "ray_nodes": 2, **on_cluster(given.path, count)})
    print(json.dumps(rows[-1]), flush=True)
    if given.out:
        result = {"a_round": A_ROUND, "rows": rows, "measured": provenance()}
        text = re.sub(re.escape(given.path), "DIR", json.dumps(result, indent=2))
        given.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
