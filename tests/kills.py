"""A training run that is killed again and again:  python tests/kills.py [HOW OFTEN]

Every time a small run gets SIGKILL at a random moment, while it starts, computes or saves, and `--resume` must go on with it.
In the end its weights, moments and averages must equal those of an undisturbed run, bit for bit. Some ten seconds a kill.
"""

import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent.parent))

from conftest import equal_tensors, newest_checkpoint

import train

ROOT = Path(__file__).parent.parent
RUN = [
    "--stage",
    "letters",
    "--device",
    "cpu",
    "--precision",
    "float32",
    "--batch",
    "4",
    "--channels",
    "16",
    "--T",
    "20",
]
RUN += [
    "--multipliers",
    "1",
    "1",
    "--overfit",
    "64",
    "--save-every",
    "5",
    "--validate-every",
    "50",
    "--preview-every",
    "100000",
]


def begin(out, updates):
    """The command that a user would type: the run, or --resume where there is something to go on from."""
    how = (
        ["--stage", "letters", "--resume"]
        if train.checkpoints(out)
        else [*RUN, "--updates", str(updates)]
    )
    command = [sys.executable, str(ROOT / "train.py"), *how, "--out", str(out)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def lines(out):
    return (out / "log.csv").read_text().count("\n") if (out / "log.csv").exists() else 0


def main(kills):
    chance, during_save, updates = random.Random(0), 0, 60 * kills
    with tempfile.TemporaryDirectory() as folder:
        whole, out = Path(folder) / "whole", Path(folder) / "killed"
        assert begin(whole, updates).wait() == 0
        for _ in tqdm(range(kills), unit="kill"):
            run, before = begin(out, updates), lines(out)
            if chance.random() < 0.9:  # the others die before they begin
                while run.poll() is None and lines(out) in (0, before):
                    time.sleep(0.01)
            time.sleep(chance.uniform(0, 1))
            if run.poll() is not None:
                sys.exit(f"the run ended by itself, with {run.returncode}: {run.stderr.read()}")
            run.kill()
            run.wait()
            during_save += any(out.glob(".*"))
        last = begin(out, updates)
        assert last.wait() == 0, last.stderr.read()
        (one, tensors), (two, others) = newest_checkpoint(whole), newest_checkpoint(out)
        assert one["update"] == two["update"] == updates and equal_tensors(tensors, others), (
            "the weights differ"
        )
        assert all(
            equal_tensors(a, b)
            for a, b in zip(
                *(
                    torch.load(run / "model.pt", weights_only=True)["weights"].values()
                    for run in (whole, out)
                )
            )
        )
        assert not any(out.glob(".*"))
    print(
        f"{kills} kills, {during_save} of them during a save: the weights after {updates:,} updates are the undisturbed run's"
    )


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 50)
