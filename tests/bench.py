"""Performance, measured as ratios within one run:  python tests/bench.py

training     images/s of the letters model, in float32 and bf16, and the share of the machine's peak, measured beside it
sampling     images/s with PLMS-50 and guidance against the bare network, and the share of the time outside it
solvers      error against evaluations on a Gaussian mixture, letters recognised against steps -> assets/solvers.png
guidance     letters recognised and their variety against the scale, both guidances -> assets/guidance.png
unet         the thesis's 400M U-Net at batch 2: forward, forward + backward, peak memory, in every mode; AdamW on its weights
latent       the thesis's 400M model: one update at batch 1, one 256 x 256 picture; seconds and peak memory
packing      opening a packed set of 400,000 images
first-stage  nearest of 16384 codes against the plain distance matrix; encode and decode at the published size; peak memory
paintings    packing 512 px JPEGs at 256 against a loop of plain Pillow, sRGB -> LAB, the painter; one process each
evaluation   the Frechet distance against scipy's matrix root, images/s of features and of the loader, memory

python tests/bench.py paintings    runs one of them; without a name all but solvers and guidance, which draw pictures
python tests/bench.py unet first-stage sampling --against diffusers    the same work with that library, if it is installed
"""

import argparse
import importlib.util
import multiprocessing
import sys
import tempfile
import time
from collections import deque
from pathlib import Path

import numpy as np
import scipy.linalg
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parent.parent))

from data import (
    ALPHABET,
    ASSETS,
    UserError,
    bars,
    chart,
    crop_and_resize,
    embedded_letters,
    grid,
    open_packed,
    pack_paintings,
    paint,
    rgb_to_lab,
    run_program,
    stacked,
    to_tensor,
    tune,
)
from ddpm import Diffusion, linear_schedule
from fid import (
    Inception,
    Source,
    Statistics,
    frechet_distance,
    inception_features,
    letters_classifier,
    letters_features,
    measure,
    paintings_features,
    variety,
)
from ldm import PixelDiffusion
from sample import ddim, ddpm, denoise, dpm, generate, load, load_classifier, plms, timesteps
from train import (
    EMA,
    SIZES,
    Latent,
    Letters,
    checkpoint_activations,
    resident_peak,
    untrained_latent,
)
from unet import latent_unet, letters_unet
from vqgan import VQGAN, nearest_code


def seconds(call, times=5, clock=time.perf_counter):
    """The fastest of several calls, after one that does not count; by `time.process_time` the sum over the cores."""
    call()
    best = float("inf")
    for _ in range(times):
        start = clock()
        call()
        best = min(best, clock() - start)
    return best


def letters_model():
    size = SIZES[Letters]["small"]
    unet = letters_unet(size["channels"], size["multipliers"], 1, 27)
    for p in unet.parameters():
        p.data += 0.01 * torch.randn_like(p)
    return PixelDiffusion(unet, linear_schedule(), ALPHABET, (3, 32, 32)).to(
        memory_format=torch.channels_last
    )


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
    with FlopCounterMode(display=False) as counter:
        update(False)
    flops = counter.get_total_flops()
    for bf16 in (False, True):
        taken, name = seconds(lambda: update(bf16)), "bf16" if bf16 else "float32"  # noqa: B023
        product, convolution = peaks(bf16)
        rate, shares = flops / taken / 1e9, []
        for peak, what in ((convolution, "convolutions"), (product, "matrix products")):
            shares.append(f"{1e11 * rate / peak:.0f} % of the peak of {what} ({peak / 1e9:.0f})")
        print(
            f"training, {count:.1f}M parameters, batch {batch}, {name}: {batch / taken:.0f} images/s"
        )
        print(f"    {rate:.0f} Gflop/s, {' and '.join(shares)}")


def peaks(bf16):
    """Floating-point operations a second of a large matrix product and of a large 3 x 3 convolution."""
    dtype = torch.bfloat16 if bf16 else torch.float32
    n, x, conv = (
        2048,
        torch.randn(8, 256, 32, 32),
        torch.nn.Conv2d(256, 256, 3, padding=1).to(dtype),
    )
    a, x = torch.randn(n, n).to(dtype), x.to(dtype).contiguous(memory_format=torch.channels_last)
    conv = conv.to(memory_format=torch.channels_last)
    with torch.no_grad():
        return 2 * n**3 / seconds(lambda: a @ a), 2 * x.numel() * 256 * 9 / seconds(lambda: conv(x))


def bench_sampling(batch=64, steps=50, rounds=2, against=None):
    """PLMS with guidance, and as many evaluations of the bare network at the same batch and precision, step by step in turns.

    The letters model and the small latent model, random weights.
    """
    for name, model in (("letters", letters_model()), ("latents", latent_model("small"))):
        for bf16 in (False, True):
            sampling, bare, inside = sampling_times(model.eval(), batch, steps, rounds, bf16)
            what = f"sampling {name}, PLMS-{steps}, scale 2, batch {batch}, {'bf16' if bf16 else 'float32'}"
            rate = f"{batch / sampling:.1f} images/s; {bare / sampling:.3f} of the images/s of {steps + 1} bare evaluations"
            print(
                f"{what}: {rate}\n    {100 - 100 * inside / sampling:.2f} % of the time outside the network",
                flush=True,
            )
    x, alpha_bar = torch.randn(16, 4, 32, 32), model.diffusion.alpha_bar
    ours = seconds(
        lambda: deque(plms(lambda x, t: 0.1 * x, x, timesteps(1000, steps), alpha_bar), maxlen=1)
    )
    print(
        f"sampler alone, PLMS-{steps}, 16 latents of 4 x 32 x 32, a network that takes no time: {1000 * ours:.1f} ms",
        end="",
    )
    if against:
        theirs = seconds(lambda: pndm(x, steps))
        print(
            f"; diffusers' PNDM {1000 * theirs:.1f} ms, {theirs / ours:.1f} times as long", end=""
        )
    print()


@torch.no_grad()
def sampling_times(model, batch, steps, rounds, bf16):
    """Seconds of one sampling, of as many bare evaluations, and of the sampling inside the network: of every step the fastest
    of the rounds."""
    network, inside = model.unet.forward, 0.0
    y, seeds = np.arange(batch) % model.zero_label, np.arange(batch)
    x, t, labels = (
        torch.randn(2 * batch, *model.shape),
        torch.full((2 * batch,), 500),
        np.arange(2 * batch) % model.zero_label,
    )
    x, condition = (
        x.contiguous(memory_format=torch.channels_last),
        model.condition(torch.from_numpy(labels)),
    )

    def timed(*args, **kwargs):
        nonlocal inside
        start = time.perf_counter()
        out = network(*args, **kwargs)
        inside += time.perf_counter() - start
        return out

    def bare():
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            network(x, t, **condition)

    bare()
    times = np.zeros((3, rounds, steps))  # sampling, bare, inside
    model.unet.forward = timed
    for i in range(rounds):
        path = denoise(model, y, seeds, steps=steps, scale=2.0, bf16=bf16)
        for j in range(steps):
            inside, start = 0.0, time.perf_counter()
            next(path)
            middle = time.perf_counter()
            for _ in range(1 + (j == 0)):  # PLMS looks ahead once
                bare()
            times[:, i, j] = middle - start, time.perf_counter() - middle, inside
    model.unet.forward = network
    return times.min(1).sum(1)


def pndm(x, steps):
    from diffusers import PNDMScheduler

    scheduler = PNDMScheduler(skip_prk_steps=True)
    scheduler.set_timesteps(steps)
    for t in scheduler.timesteps:
        x = scheduler.step(0.1 * x, t, x).prev_sample
    return x


# ------------------------------------------------------------------------------------------------------------------
# Solvers and guidance: what fewer steps and larger scales cost
# ------------------------------------------------------------------------------------------------------------------


class Mixture:
    """Data 0.4 N(-0.7, 0.1^2) + 0.6 N(0.5, 0.25^2), and with it everything about x_t, exactly."""

    w, m, s = torch.tensor([[0.4, 0.6], [-0.7, 0.5], [0.1, 0.25]], dtype=torch.float64)
    alpha_bar = Diffusion(linear_schedule()).alpha_bar

    def law(self, t):
        a = self.alpha_bar[t]
        return a.sqrt() * self.m, a * self.s**2 + 1 - a

    def log_f(self, x, t):
        """log f(y | x_t, t): from which of the two x_t comes, (B, 2)."""
        mean, var = self.law(t)
        return (self.w.log() - var.log() / 2 - (x[:, None] - mean) ** 2 / (2 * var)).log_softmax(1)

    def eps(self, x, t):
        mean, var = self.law(t)
        each = (1 - self.alpha_bar[t]).sqrt() * (x[:, None] - mean) / var
        return (self.log_f(x, t).exp() * each).sum(1)

    def quantiles(self, t, n):
        """The n values at the probabilities 1/2n, 3/2n, ... of x_t, by bisection."""
        mean, var = self.law(t)
        p = (torch.arange(n, dtype=torch.float64) + 0.5) / n
        low, high = torch.full_like(p, -9), torch.full_like(p, 9)
        for _ in range(60):
            x = (low + high) / 2
            below = (self.w * torch.special.ndtr((x[:, None] - mean) / var.sqrt())).sum(1) < p
            low, high = torch.where(below, x, low), torch.where(below, high, x)
        return x


def bench_solvers(counts=(5, 10, 15, 20, 50, 100), each=4, samples=200_000):
    """Writes assets/solvers.png. On the mixture: the mean distance of a sampler's values from the data's, both in order (the
    Wasserstein distance in one dimension); that of the random sampler includes 0.002 for the number of its samples."""
    mixture, generator, lines = Mixture(), torch.Generator().manual_seed(0), {}
    for sampler, name in NAMES.items():
        n = samples if sampler is ddpm else 2000
        noise = (
            [lambda: torch.randn(samples, generator=generator, dtype=torch.float64)]
            if sampler is ddpm
            else []
        )
        start, exact = mixture.quantiles(1000, n), mixture.quantiles(0, n)
        errors = []
        for steps in counts:
            *_, (_, x, _) = sampler(
                mixture.eps, start, timesteps(1000, steps), mixture.alpha_bar, *noise
            )
            errors.append((x.sort().values - exact).abs().mean().item())
        lines[name] = [([steps + (sampler is plms) for steps in counts], errors)]
        print(
            f"mixture, {name:15} "
            + "  ".join(f"{steps}: {error:.4f}" for steps, error in zip(counts, errors))
        )
    title = "Error on a mixture of two Gaussians"
    pictures = [chart(lines, title, "evaluations", "mean distance of sorted values", (940, 320))]

    model, judge, rows, shown, names = load(ASSETS / "letters.pt"), letters_judge(), [], [], []
    y = np.arange(26).repeat(each)
    for steps in (5, 10, 20, 50):
        for sampler, name in NAMES.items():
            images = generate(
                model, y, sampler=sampler.__name__, steps=steps, bf16=True, progress=False
            )
            rows.append(
                {"label": f"{steps} steps", "set": name, "recognised": 100 * judge(images, y)}
            )
            print(f"letters, {name:15} {steps}: {rows[-1]['recognised']:.1f} %", flush=True)
            if steps <= 10:
                shown.append(images[:: 2 * each])
                names.append(f"{name.split()[0]} {steps}")
    pictures.append(bars(rows, "recognised", f"Letters recognised, % of {len(y)}", size=(940, 250)))
    pictures.append(grid(np.concatenate(shown), 13, names, scale=2))
    stacked(pictures).save(ASSETS / "solvers.png")


NAMES = {ddpm: "DDPM", ddim: "DDIM", plms: "PLMS", dpm: "DPM-Solver++ 2M"}


def bench_guidance(scales=(1, 2, 5, 15), each=8):
    """Writes assets/guidance.png; needs runs/classifier from `python train.py --stage classifier`."""
    model, judge = load(ASSETS / "letters.pt"), letters_judge()
    classifier = load_classifier("runs/classifier", model)
    y, shown, names = np.arange(26).repeat(each), [], []
    real = validation_letters()
    print(
        f"validation fonts: {100 * judge(real, np.arange(26).repeat(40)):.1f} %, variety {letters_variety(real):.1f}"
    )
    for name, guide in (("classifier-free", None), ("classifier", classifier)):
        for scale in scales:
            images = generate(model, y, scale=scale, classifier=guide, bf16=True, progress=False)
            recognised, spread = 100 * judge(images, y), letters_variety(images)
            print(f"{name}, scale {scale}: {recognised:.1f} %, variety {spread:.1f}", flush=True)
            shown.append(images[:: 2 * each])
            names.append(f"{name} {scale}")
    grid(np.concatenate(shown), 13, names, scale=2).save(ASSETS / "guidance.png")


def validation_letters():
    """(26 x 40, 32, 32, 3) uint8, in the order of the alphabet."""
    letters = embedded_letters()
    _, fonts = letters.split()
    return letters.images[fonts][np.argsort(letters.labels[fonts], kind="stable")].repeat(3, -1)


def letters_judge():
    """The share of images (N, 32, 32, 3) that the letters classifier of fid.py names as they are labelled."""
    network = letters_classifier()
    network.load_state_dict(torch.load(ASSETS / "letters_classifier.pt", weights_only=True))
    network.float().eval()

    @torch.no_grad()
    def judge(images, y):
        return (network(to_tensor(images)[:, :1]).argmax(1).numpy() == y).mean()

    return judge


def letters_variety(images):
    """`variety` of images in the order of the alphabet, averaged over the letters."""
    return variety(images.reshape(26, -1, *images.shape[1:])).mean()


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


def bench_first_stage(against=None):
    g = torch.Generator().manual_seed(0)
    codes, z = torch.randn((16384, 4), generator=g), torch.randn((8192, 4), generator=g)

    def matrix():  # the usual way: all N x K distances
        return (z.square().sum(1, keepdim=True) + codes.square().sum(1) - 2 * z @ codes.T).argmin(1)

    plain, tree = seconds(matrix, 2), seconds(lambda: nearest_code(z, codes))
    young = seconds(lambda: nearest_code(z, codes / 16384))
    print(
        f"nearest of 16384 codes for 8192 vectors: {1000 * tree:.1f} ms, distance matrix {1000 * plain:.0f} ms"
    )
    print(
        f"    ({plain / tree:.0f} times as fast; with codes as initialised {plain / young:.0f} times)"
    )
    for what in ("codes", 256, 512):
        mib, taken = in_new_process(first_stage_memory, what)
        name = (
            "search"
            if what == "codes"
            else f"encode + decode of {what} x {what}, published size, float32"
        )
        print(f"    {name}: peak memory + {mib:.0f} MiB, {taken:.2f} s")
    print(f"{'first stage of the published size, 256 x 256, CPU time':52} encode, s  decode, s")
    for name in ("ours", "diffusers")[: 2 if against else 1]:
        for bf16 in (False, True):
            encode, decode = in_new_process(first_stage_times, name, bf16)
            print(
                f"{'    ' + name + (', bf16' if bf16 else ', float32'):52} {encode:9.2f}  {decode:9.2f}"
            )


@torch.no_grad()
def first_stage_times(name, bf16):
    """CPU seconds of encoding and of decoding one image."""
    x = torch.rand(1, 3, 256, 256) * 2 - 1
    if name == "diffusers":
        from diffusers import VQModel

        down, up = "DownEncoderBlock2D", "UpDecoderBlock2D"
        widths = {
            "block_out_channels": (128, 256, 256, 512),
            "layers_per_block": 2,
            "norm_num_groups": 32,
        }
        blocks = {
            "down_block_types": (down, down, down, "Attn" + down),
            "up_block_types": ("Attn" + up, up, up, up),
        }
        latent = {"latent_channels": 4, "num_vq_embeddings": 16384, "vq_embed_dim": 4}
        model = VQModel(sample_size=256, **widths, **blocks, **latent).eval()
        encode, decode = (lambda: model.encode(x).latents), (lambda z: model.decode(z).sample)
    else:
        tune("cpu")
        model = VQGAN().eval().to(memory_format=torch.channels_last)
        encode, decode = (lambda: model.encode(x)), model.decode
    assert sum(p.numel() for p in model.parameters()) == 67_717_295
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        z = encode().float()
        return seconds(encode, 3, time.process_time), seconds(
            lambda: decode(z), 3, time.process_time
        )


def first_stage_memory(what):
    """Peak memory in MiB above what the inputs and weights take, and seconds."""
    torch.manual_seed(0)
    if what == "codes":
        codes, z = torch.randn(16384, 4), torch.randn(8192, 4)
        call = lambda: nearest_code(z, codes)  # noqa: E731
    else:
        tune("cpu")
        model, x = VQGAN().eval(), torch.rand(1, 3, what, what) * 2 - 1
        call = torch.no_grad()(lambda: model.decode(model.encode(x)))
    nearest_code(torch.zeros(1, 4), torch.zeros(1, 4))
    before, start = resident_peak(), time.perf_counter()
    call()
    return resident_peak() - before, time.perf_counter() - start


def in_new_process(function, *arguments):
    """For memory, since the peak of a process never falls, and for settings that cannot be taken back."""
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
        print(
            f"Frechet distance, {d} features, {count:,} images: {ours:.2f} s; sqrtm {root:.1f} s, {ratio}"
        )


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


def streaming_memory(count, keep):
    """How much the memory of this process rises, MiB, when `count` images are measured with 2048 features each."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        source = repeated(folder, count, size=64, label="none")
        list(
            measure(
                repeated(folder, 64, size=64, label="none"),
                lambda images: torch.randn(len(images), 8),
            )
        )
        before = resident_peak()
        list(measure(source, lambda images: torch.randn(len(images), 2048), keep))
        return resident_peak() - before


def bench_memory():
    """Below 2048 images the rows are kept (16 KiB each); from there on it is flat. Kept features, 8 KiB each, end at 10,000."""
    for what, keep in (("Frechet distance alone", 0), ("with 10,000 features kept", 10_000)):
        rise = [in_new_process(streaming_memory, count, keep) for count in (1000, 3000, 20_000)]
        print(
            f"memory, {what}: {rise[0]:.0f}, {rise[1]:.0f}, {rise[2]:.0f} MiB at 1,000, 3,000 and 20,000 images"
        )


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
            Image.fromarray(picture).resize((512, 512), Image.Resampling.LANCZOS).save(
                root / f"{i}.jpg", quality=90
            )

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


# What a row of the table below is: ours without and with `tune`, with channels last as `ldm.py` has it, and so on
MODES = {
    "ours, torch's defaults, channels first, float32": (),
    "ours, torch's defaults, float32": ("last",),
    "ours, channels first, float32": ("tune",),
    "ours, float32": ("tune", "last"),
    "ours, float32, activations computed again": ("tune", "last", "again"),
    "ours, bf16": ("tune", "last", "bf16"),
    "ours, bf16, activations computed again": ("tune", "last", "bf16", "again"),
    "ours, bf16, torch.compile": ("tune", "last", "bf16", "compile"),
}
THEIR_MODES = {
    "diffusers, float32": ("diffusers",),
    "diffusers, bf16": ("diffusers", "bf16"),
    "diffusers, tuned as ours, float32": ("diffusers", "tune"),
}


def bench_unet(against=None):
    print(
        f"{'U-Net of 394,984,196 parameters, batch 2, CPU time':52} forward, s  + backward, s  peak, MiB"
    )
    for name, mode in (MODES | (THEIR_MODES if against else {})).items():
        mib, forward, both = in_new_process(unet_times, mode)
        print(f"{'    ' + name:52} {forward:10.2f}  {both:13.2f}  {mib:9,.0f}", flush=True)
    for name, how in (("fused, as in train.py", {"fused": True}), ("torch's default", {})):
        print(
            f"    AdamW on as many parameters, {name}: {in_new_process(adamw_time, how):.2f} s of CPU time"
        )


def unet_times(mode):
    """Peak memory, MiB, of forward and backward; CPU seconds of a forward alone and of both, float32 unless `mode` has bf16."""
    if "tune" in mode:
        tune("cpu")
    torch.manual_seed(0)
    x, t, context = torch.randn(2, 4, 32, 32), torch.tensor([500, 100]), torch.randn(2, 1, 512)
    if "diffusers" in mode:
        from diffusers import UNet2DConditionModel

        widths = {
            "block_out_channels": (256, 512, 1024),
            "attention_head_dim": (8, 16, 32),
            "cross_attention_dim": 512,
        }
        blocks = {
            "down_block_types": ("CrossAttnDownBlock2D",) * 3,
            "up_block_types": ("CrossAttnUpBlock2D",) * 3,
        }
        unet = UNet2DConditionModel(32, 4, 4, **widths, **blocks, layers_per_block=2)
        call = lambda: unet(x, t, context).sample  # noqa: E731
    else:
        unet = latent_unet(256, (1, 2, 4), 2, 4, 512)
        call = lambda: unet(x, t, context=context)  # noqa: E731
    assert sum(p.numel() for p in unet.parameters()) == 394_984_196
    if "last" in mode:
        unet, x = (
            unet.to(memory_format=torch.channels_last),
            x.contiguous(memory_format=torch.channels_last),
        )
    if "again" in mode:
        checkpoint_activations(unet)
    if "compile" in mode:
        unet.compile()

    def forward():
        with torch.autocast("cpu", torch.bfloat16, enabled="bf16" in mode):
            return call()

    def both():
        unet.zero_grad()
        forward().float().square().mean().backward()

    taken = (
        seconds(torch.no_grad()(forward), 3, time.process_time),
        seconds(both, 2, time.process_time),
    )
    return resident_peak(), *taken


def adamw_time(how):
    parameters = [torch.zeros(394_984_196 // 600, requires_grad=True) for _ in range(600)]
    for p in parameters:
        p.grad = torch.full_like(p, 1e-3)
    return seconds(torch.optim.AdamW(parameters, 1e-4, **how).step, 3, time.process_time)


def bench_latent():
    """The thesis's 400M model: one training update, and one picture from end to end, at random weights."""
    for name, bf16, again in (
        ("float32", False, False),
        ("bf16", True, False),
        ("bf16, --checkpoint-activations", True, True),
    ):
        mib, taken = in_new_process(latent_update, bf16, again)
        print(
            f"latent, an update of 394,984,196 parameters at batch 1, {name}: {taken:.1f} s, peak memory {mib:,.0f} MiB"
        )
    for name, bf16 in (("float32", False), ("bf16", True)):
        mib, taken = in_new_process(latent_picture, bf16)
        print(
            f"latent, one 256 x 256 picture, PLMS-50, scale 2, {name}: {taken:.1f} s, peak memory {mib:,.0f} MiB"
        )


def latent_model(size):
    return untrained_latent(size, SIZES[Latent][size])


def latent_update(bf16, again):
    """Peak memory in MiB, and seconds of the second update: forward, backward, clipping, AdamW, averaging."""
    tune("cpu")
    model = latent_model("thesis")
    if again:
        checkpoint_activations(model.unet)
    ema = EMA(model, 0.9999)
    optimizer = torch.optim.AdamW(ema.parameters, 6.4e-5, fused=True)
    z, noise, y, t = (
        torch.randn(1, *model.shape),
        torch.randn(1, *model.shape),
        torch.tensor([2]),
        torch.tensor([500]),
    )
    for n in range(2):
        start = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = model.loss(z, y, t, noise).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(ema.parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        ema.update(n)
    return resident_peak(), time.perf_counter() - start


def latent_picture(bf16):
    tune("cpu")
    model = latent_model("thesis").eval()
    start = time.perf_counter()
    generate(model, [2], steps=50, scale=2.0, bf16=bf16, progress=False)
    return resident_peak(), time.perf_counter() - start


BENCHES = {
    "training": bench_training,
    "sampling": bench_sampling,
    "solvers": bench_solvers,
    "guidance": bench_guidance,
    "unet": bench_unet,
    "latent": bench_latent,
    "packing": bench_opening,
    "first-stage": bench_first_stage,
    "paintings": bench_paintings,
    "evaluation": bench_evaluation,
}

COMPARED = ("unet", "first-stage", "sampling")


def main():
    p = argparse.ArgumentParser(description="Performance, measured as ratios within one run.")
    p.add_argument(
        "names",
        nargs="*",
        metavar="NAME",
        help=f"default: all but solvers and guidance of {', '.join(BENCHES)}",
    )
    p.add_argument(
        "--against",
        choices=("diffusers",),
        help=f"{', '.join(COMPARED)}: the same work with that library",
    )
    args = p.parse_args()
    unknown = [name for name in args.names if name not in BENCHES]
    if unknown:
        raise UserError(f"{unknown[0]}: expected {', '.join(BENCHES)}")
    if args.against and not importlib.util.find_spec(args.against):
        raise UserError(
            f"{args.against} is not installed; pip install {args.against} into an environment of its own"
        )
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    tune("cpu")
    for name in args.names or [name for name in BENCHES if name not in ("solvers", "guidance")]:
        BENCHES[name](**{"against": args.against} if name in COMPARED else {})


if __name__ == "__main__":
    run_program(main)
