"""A training run that is killed again and again:  python tests/kills.py [HOW OFTEN]

A small run gets SIGKILL at a random moment: while it starts, computes or saves. Then the run is
started again, with `--resume` if there is a checkpoint. In the end its weights, moments and
averages must equal those of an undisturbed run, bit for bit. Some ten seconds per kill.
"""

import random
import shutil
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
RUN = "--stage letters --device cpu --precision float32 --batch 4 --channels 16 --T 20 "
RUN += "--overfit 64 --multipliers 1 1 --save-every 5 --validate-every 50 --preview-every 100000"


def begin(out, updates):
    """The command that a user would type."""
    if not train.checkpoints(out):
        shutil.rmtree(out, ignore_errors=True)  # killed before the first checkpoint
    command = f"{RUN} --updates {updates} --out {out}".split()
    command = [sys.executable, str(ROOT / "train.py"), *command]
    command += ["--resume"] * bool(train.checkpoints(out))
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def rows(out):
    return (out / "log.csv").read_text().count("\n") if (out / "log.csv").exists() else 0


def weights(out):
    return torch.load(out / "model.pt", weights_only=True)["weights"]


def main(kills):
    chance, during_save, updates = random.Random(0), 0, 60 * kills
    with tempfile.TemporaryDirectory() as folder:
        whole, out = Path(folder) / "whole", Path(folder) / "killed"
        assert begin(whole, updates).wait() == 0
        for _ in tqdm(range(kills), unit="kill"):
            run, before = begin(out, updates), rows(out)
            if chance.random() < 0.9:  # the others die before they begin
                while run.poll() is None and rows(out) in (0, before):
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
        assert one["update"] == two["update"] == updates
        assert equal_tensors(tensors, others), "the weights differ"
        a, b = weights(whole), weights(out)
        assert all(equal_tensors(a[kind], b[kind]) for kind in ("raw", "ema"))
        assert not any(out.glob(".*"))
    print(
        f"{kills} kills, {during_save} of them during a save. After {updates:,} updates the weights"
    )
    print("are those of the undisturbed run, bit for bit.")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 50)
