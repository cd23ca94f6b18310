"""Performance, measured as ratios within one run:  python tests/bench.py

training     images/s of the letters model, in float32 and bf16
sampling     images/s with PLMS-50 and guidance, and the share of the time spent outside the network
packing      opening a packed set of 400,000 images
first-stage  nearest of 16384 codes against the plain distance matrix; encode + decode at the published size; peak memory
paintings    packing 512 px JPEGs at 256 against a loop of plain Pillow, sRGB -> LAB, the painter; one process each
evaluation   the Frechet distance against scipy's matrix root, images/s of features and of the loader, memory

python tests/bench.py paintings    runs one of them
"""

import multiprocessing
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import scipy.linalg
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent.parent))

from data import ALPHABET, crop_and_resize, open_packed, pack_paintings, paint, rgb_to_lab
from ddpm import linear_schedule
from fid import (
    Inception,
    Source,
    Statistics,
    frechet_distance,
    inception_features,
    letters_features,
    measure,
    paintings_features,
)
from ldm import PixelDiffusion
from sample import denoise
from train import SIZES, Letters
from unet import letters_unet
from vqgan import VQGAN, nearest_code


def seconds(call, times=5):
    """The fastest of several calls, after one that does not count."""
    call()
    best = float("inf")
    for _ in range(times):
        start = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - start)
    return best


def letters_model():
    size = SIZES[Letters]["small"]
    unet = letters_unet(size["channels"], size["multipliers"], 1, 27)
    for p in unet.parameters():
        p.data += 0.01 * torch.randn_like(p)
    return PixelDiffusion(unet, linear_schedule(), ALPHABET, (3, 32, 32)).to(memory_format=torch.channels_last)


def bench_training(batch=64):
    model = letters_model()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4, fused=True)
    x, y = torch.randn(batch, 3, 32, 32), torch.randint(0, 27, (batch,))
    t = torch.randint(1, 1001, (batch,))

    def update(bf16):
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            model.loss(x, y, t, torch.randn_like(x)).mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    count = sum(p.numel() for p in model.parameters()) / 1e6
    single, bf16 = (batch / seconds(lambda: update(b)) for b in (False, True))  # noqa: B023
    print(f"training, {count:.1f}M parameters, batch {batch}: {single:.0f} images/s float32, {bf16:.0f} bf16")


def bench_sampling(batch=20, steps=50):
    model = letters_model().eval()
    inside, network = 0.0, model.unet.forward

    def timed(*args, **kwargs):
        nonlocal inside
        start = time.perf_counter()
        out = network(*args, **kwargs)
        inside += time.perf_counter() - start
        return out

    model.unet.forward = timed
    y, seeds = np.arange(batch) % 26, np.arange(batch)
    list(denoise(model, y, seeds, steps=2))
    inside, start = 0.0, time.perf_counter()
    list(denoise(model, y, seeds, steps=steps, scale=2.0))
    total = time.perf_counter() - start
    print(
        f"sampling, PLMS-{steps}, scale 2, batch {batch}: {total:.1f} s, {batch / total:.1f} images/s, "
        f"{100 * (1 - inside / total):.1f} % outside the network"
    )


def bench_opening(count=400_000):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "fonts.npz"
        images = np.random.default_rng(0).integers(0, 256, (count, 32, 32), np.uint8)
        np.savez(path, images=images, labels=np.arange(count) % 26)
        first = time.perf_counter()
        open_packed(path, 32)
        packing = time.perf_counter() - first
        opening = seconds(lambda: open_packed(path, 32))
        letters = open_packed(path, 32)
        rows = np.random.default_rng(0).integers(0, count, 512)
        batch = seconds(lambda: letters.batch(rows))
    print(
        f"packing {count:,} images: {count / packing:,.0f} images/s; opening them {1000 * opening:.1f} ms; "
        f"a batch of 512 {1000 * batch:.1f} ms"
    )


def bench_first_stage():
    g = torch.Generator().manual_seed(0)
    codes, z = torch.randn((16384, 4), generator=g), torch.randn((8192, 4), generator=g)

    def matrix():  # the usual way: all N x K distances
        return (z.square().sum(1, keepdim=True) + codes.square().sum(1) - 2 * z @ codes.T).argmin(1)

    plain, tree = seconds(matrix, 2), seconds(lambda: nearest_code(z, codes))
    young = seconds(lambda: nearest_code(z, codes / 16384))
    print(f"nearest of 16384 codes for 8192 vectors: {1000 * tree:.1f} ms, distance matrix {1000 * plain:.0f} ms")
    print(f"    ({plain / tree:.0f} times as fast; with codes as initialised {plain / young:.0f} times)")
    for what in ("codes", 256, 512):
        mib, taken = in_new_process(first_stage_memory, what)
        name = "search" if what == "codes" else f"encode + decode of {what} x {what}, published size, float32"
        print(f"    {name}: peak memory + {mib:.0f} MiB, {taken:.2f} s")


def first_stage_memory(what):
    """Peak memory in MiB above what the inputs and weights take, and seconds."""
    torch.manual_seed(0)
    if what == "codes":
        codes, z = torch.randn(16384, 4), torch.randn(8192, 4)
        call = lambda: nearest_code(z, codes)  # noqa: E731
    else:
        model, x = VQGAN().eval(), torch.rand(1, 3, what, what) * 2 - 1
        call = torch.no_grad()(lambda: model.decode(model.encode(x)))
    nearest_code(torch.zeros(1, 4), torch.zeros(1, 4))
    before, start = peak_memory(), time.perf_counter()
    call()
    return peak_memory() - before, time.perf_counter() - start


def in_new_process(function, *arguments):
    """For memory: the peak of a process never falls."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


def bench_frechet(d=2048):
    """Scipy's root of the product of the covariances is what the published tool takes; ours includes everything."""
    mix = torch.randn(d, d, dtype=torch.float64) / d**0.5
    for count in (4000, 147):
        sets = [Statistics(), Statistics()]
        for s, n in zip(sets, (4000, count)):
            s.add(torch.randn(n, d, dtype=torch.float64) @ mix)
        covariances = [x.T @ x if C is None else C for _, x, C in (s.moments() for s in sets)]
        product = (covariances[0] @ covariances[1]).numpy()
        start = time.perf_counter()
        scipy.linalg.sqrtm(product)
        root = time.perf_counter() - start
        ours = seconds(lambda: frechet_distance(*sets), 2)  # noqa: B023
        ratio = f"{root / ours:.0f} times as long"
        print(f"Frechet distance, {d} features, {count:,} images: {ours:.2f} s; sqrtm {root:.1f} s, {ratio}")


def bench_features(batch=16):
    images = torch.randint(0, 256, (batch, 256, 256, 3), dtype=torch.uint8)
    for features, x in (
        (inception_features(Inception()), images),
        (paintings_features(), images),
        (letters_features(), images[:, :32, :32]),
    ):
        print(f"features, {features.name}: {batch / seconds(lambda: features(x), 2):.1f} images/s")  # noqa: B023


def repeated(folder, count, size=512, label="purple"):
    """A set of `count` images on the disk, all the same file."""
    file = Path(folder) / "image.jpg"
    noise = np.random.default_rng(0).integers(0, 256, (size // 8, size // 8, 3), np.uint8)
    Image.fromarray(noise).resize((size, size)).save(file)
    source = Source("repeated", [file] * count, np.zeros(count, int), [label])
    source.size = size // 2
    return source


def bench_loader(count=400):
    with tempfile.TemporaryDirectory() as folder:
        for workers in (0, 1, 2):
            for label in ("none", "purple"):
                source = repeated(folder, count, label=label)
                rate = count / seconds(lambda: list(measure(source, None, workers=workers)), 1)  # noqa: B023
                what = "JPEG 512 -> 256" + (" and colour distances" if label == "purple" else "")
                print(f"loader, {what}, {workers} worker processes: {rate:.0f} images/s")


def peak_memory():
    """The most memory this process ever had, MiB. (What getrusage says is inherited from the process that started it.)"""
    return next(int(line.split()[1]) / 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))


def streaming_memory(count, keep):
    """How much the memory of this process rises, MiB, when `count` images are measured with 2048 features each."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        source = repeated(folder, count, size=64, label="none")
        list(measure(repeated(folder, 64, size=64, label="none"), lambda images: torch.randn(len(images), 8)))
        before = peak_memory()
        list(measure(source, lambda images: torch.randn(len(images), 2048), keep))
        return peak_memory() - before


def bench_memory():
    """Below 2048 images the rows are kept (16 KiB each); from there on it is flat. Kept features, 8 KiB each, end at 10,000."""
    for what, keep in (("Frechet distance alone", 0), ("with 10,000 features kept", 10_000)):
        rise = [in_new_process(streaming_memory, count, keep) for count in (1000, 3000, 20_000)]
        print(f"memory, {what}: {rise[0]:.0f}, {rise[1]:.0f}, {rise[2]:.0f} MiB at 1,000, 3,000 and 20,000 images")


def bench_evaluation():
    for bench in (bench_frechet, bench_features, bench_loader, bench_memory):
        bench()


def bench_paintings(count=48):
    image = np.random.default_rng(0).integers(0, 256, (256, 256, 3), np.uint8)
    lab = image.size / 3e6 / seconds(lambda: rgb_to_lab(image))
    start = time.perf_counter()
    pictures = [paint(i, i % 8) for i in range(count)]
    painter = count / (time.perf_counter() - start)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "paintings"
        root.mkdir()
        for i, picture in enumerate(pictures):
            Image.fromarray(picture).resize((512, 512), Image.Resampling.LANCZOS).save(root / f"{i}.jpg", quality=90)

        def plain():
            for file in root.glob("*.jpg"):
                np.asarray(crop_and_resize(Image.open(file).convert("RGB"), 256)).tobytes()

        def packing():
            pack_paintings(root, Path(folder) / f"packed{time.perf_counter_ns()}", 256, processes=1)

        loop, packed = count / seconds(plain, 3), count / seconds(packing, 3)
    print(
        f"paintings, one process: packing {packed:.0f} images/s (plain Pillow loop {loop:.0f}), "
        f"LAB {lab:.0f} megapixels/s, painter {painter:.1f} images/s"
    )


BENCHES = {
    "training": bench_training,
    "sampling": bench_sampling,
    "packing": bench_opening,
    "first-stage": bench_first_stage,
    "paintings": bench_paintings,
    "evaluation": bench_evaluation,
}

if __name__ == "__main__":
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    for name in sys.argv[1:] or BENCHES:
        BENCHES[name]()
