"""What a GPU does with the thesis's sizes. No download; at most ten minutes.

python tests/gpu.py          writes gpu.md, a table for docs/results.md
python tests/gpu.py --toy    the same steps at toy size on the CPU, as a check of this file
"""

import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from datetime import date
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import bench

import data
import fid
import ldm
import sample
import train
from data import ALPHABET, UserError

ROOT = Path(__file__).parent.parent
TOY = "--toy" in sys.argv
DEVICE = "cpu" if TOY else "cuda"


def wait():
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def images_per_second(model, batch, precision, updates):
    """Images per second, and the most memory in GiB, of updates after one that does not count."""
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
    update = bench.update_of(model, batch, precision, DEVICE)
    update()
    wait()
    start = time.perf_counter()
    for _ in range(updates):
        update()
    wait()
    memory = torch.cuda.max_memory_allocated() / 2**30 if DEVICE == "cuda" else 0.0
    return updates * batch / (time.perf_counter() - start), memory


def agreement():
    """The networks compute on the GPU what they compute on the CPU, in float32."""
    torch.manual_seed(0)
    images = torch.randint(0, 256, (4, 64, 64, 3), dtype=torch.uint8)
    x, t, y = (
        torch.randn(4, 3, 32, 32),
        torch.tensor([1, 300, 700, 999]),
        torch.tensor([0, 5, 9, 26]),
    )
    letters, latent = bench.letters_model(), bench.latent_model(small=True)
    first, z = latent.first_stage, torch.randn(4, *latent.shape)

    def results(device):
        for model in (letters, latent):
            model.to(device)
        on = [value.to(device) for value in (x, t, y, z)]
        yield letters.eps(on[0], on[1], on[2])
        yield latent.eps(on[3], on[1], on[2] % 9)
        yield first.decode(first.encode(data.to_tensor(images).to(device)))
        yield fid.inception_features(inception, device)(images)
        *_, (_, path, _) = sample.denoise(letters, [0, 1], [0, 1], steps=5, scale=2.0)
        yield path

    inception = fid.Inception()
    with torch.no_grad():
        pairs = zip(*([v.float().cpu() for v in results(device)] for device in ("cpu", DEVICE)))
        worst = max(((a - b).norm() / a.norm()).item() for a, b in pairs)
    if worst > 0.01:
        raise UserError(f"the GPU disagrees with the CPU: a relative difference of {worst:.3g}")
    yield "largest relative difference from the CPU, five networks and a sampler", f"{worst:.1e}"


def letters():
    """The letters model of the thesis's size."""
    s = train.Letters(**(train.SMALL[train.Letters] if TOY else {}), precision="bf16")
    model = ldm.build_letters(asdict(s), ALPHABET).to(DEVICE)
    updates, batch = (2, 8) if TOY else (500, s.batch)
    rate, memory = images_per_second(model, batch, "bf16", updates)
    hours = train.Letters().updates * s.batch / rate / 3600
    what = f"letters, {batch} images per update, {updates} updates, bf16"
    yield what, f"{rate:.0f} images/s, {memory:.1f} GiB; the whole run {hours:.1f} h"


def latent():
    """An update of the latent model at the largest batch that fits."""
    for precision, compiled, checkpointed in (
        ("float32", False, False),
        ("bf16", False, False),
        ("bf16", False, True),
        ("bf16", True, False),
    ):
        model = bench.latent_model(small=TOY).to(DEVICE)
        if checkpointed:
            train.checkpoint_activations(model.unet)
        if compiled and not TOY:
            model.unet.compile()
        best, batch = None, 2
        while batch <= (2 if TOY else 256):
            try:
                best = batch, *images_per_second(model, batch, precision, 2 if TOY else 5)
            except torch.OutOfMemoryError:
                break
            batch *= 2
        more = ", activations twice" * checkpointed + ", compiled" * compiled
        result = f"{best[1]:.1f} images/s, {best[2]:.1f} GiB" if best else "does not fit"
        yield f"latent model, {precision}{more}, batch {best[0] if best else 2}", result


def pictures():
    """The thesis: 15 pictures in 40 s on a GTX 1080 Ti (4.6)."""
    model = bench.latent_model(small=TOY).to(DEVICE).eval()
    count, steps = (2, 2) if TOY else (15, 50)
    for bf16 in (False, True):
        if bf16:
            model.compute_in_bf16()
        start = time.perf_counter()
        images = sample.generate(model, ["blue"], count=count, steps=steps, progress=False)
        precision = "bf16" if bf16 else "float32"
        what = f"{count} pictures of {images.shape[1]}, PLMS {steps}, guided, {precision}"
        yield what, f"{time.perf_counter() - start:.1f} s"


def several():
    """FSDP with a process per GPU, stopped and resumed."""
    processes = torch.cuda.device_count() if DEVICE == "cuda" else 2
    size = (
        "--model small --channels 32 --multipliers 1 1 --optimizer adamw --pyramid"
        if TOY
        else "--model thesis"
    )
    with tempfile.TemporaryDirectory() as folder:
        data.paint_set(Path(folder, "set"), 64 if TOY else 256, 40)
        first = "--model small --size 64 --updates 3" if TOY else "--model thesis --updates 3"
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        torchrun += ["--nproc-per-node", str(processes)]
        common = f"--device {DEVICE} --data {folder}/set --batch {2 * processes}"
        model = f"--stage ldm {size} {common} --strategy fsdp --updates 3 --out {folder}/l"
        runs = [
            [sys.executable, *f"train.py --stage vqgan {first} {common} --out {folder}/v".split()],
            [*torchrun, *f"train.py {model} --first-stage {folder}/v".split()],
            [*torchrun, *f"train.py --stage ldm --resume --updates 5 --out {folder}/l".split()],
        ]
        start = time.perf_counter()
        for command in runs:
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
            if done.returncode:
                lines = done.stderr.strip().splitlines()
                why = [line for line in lines if line.startswith("error: ")] or lines[-1:]
                raise UserError(f"{' '.join(command[2:])}: {why[0]}")
    yield f"FSDP, {processes} processes, resumed", f"works; {time.perf_counter() - start:.0f} s"


def main():
    if not TOY and not torch.cuda.is_available():
        raise UserError("no CUDA GPU here; --toy tries the steps on the CPU")
    data.tune(DEVICE)
    machine = torch.cuda.get_device_name() if DEVICE == "cuda" else "a CPU at toy size"
    lines = [
        f"{machine}, torch {torch.__version__}, {date.today()}",
        "",
        "| what | result |",
        "|---|---|",
    ]
    for step in (agreement, letters, latent, pictures, several):
        for what, result in step():
            lines.append(f"| {what} | {result} |")
            print(lines[-1], flush=True)
    if not TOY:
        with data.whole_file("gpu.md") as temporary:
            temporary.write_text("\n".join(lines) + "\n")
        print("gpu.md")


if __name__ == "__main__":
    data.run_program(main)
