"""Measure speed and memory. Compare numbers within one run only:  python tests/bench.py [MODE]

Without a mode, all but the last five run, in about five minutes on two quiet cores.

    training      images per second of the letters model, and its share of the machine's peak
    sampling      images per second, and the share of the time that the network takes
    unet          the thesis's U-Net: forward, backward, peak memory; AdamW on its weights
    latent        the thesis's latent model: one update, one picture; seconds and peak memory
    first-stage   the first stage of the published size: encode, decode
    packing       a packed set of 400,000 images: pack it, open it, read a batch
    compile       the thesis's U-Net in bf16 with torch.compile; takes minutes to begin
    profile       where the time of an update goes
    solvers       errors of the samplers by number of steps -> assets/solvers.png
    guidance      both guidances at several scales, with runs/classifier -> assets/guidance.png
    plan GB       how many images fit on GPUs of so many GB (4.7)

unet, first-stage and sampling measure the same work with another library, too:
`python tests/bench.py unet --against diffusers --rounds 5`. Ratios are to the first row.
"""

import argparse
import importlib.util
import math
import multiprocessing
import re
import sys
import tempfile
import time
from collections import deque
from dataclasses import asdict
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode
from tqdm import trange

sys.path.insert(0, str(Path(__file__).parent.parent))

import data
import fid
import ldm
import train
from data import ALPHABET, ASSETS, COLOURS, UserError
from ddpm import Diffusion, linear_schedule
from plots import bars, chart, grid, join, save
from sample import SAMPLERS, denoise, generate, load, load_classifier, plms, timesteps
from unet import latent_unet
from vqgan import VQGAN

PRECISIONS = ("float32", "bf16")


def seconds(call, times=5, clock=time.perf_counter):
    """The fastest of several calls, after one that does not count."""
    call()
    best = math.inf
    for _ in range(times):
        start = clock()
        call()
        best = min(best, clock() - start)
    return best


def cpu_seconds(call, times=1):
    """The same in CPU time, the sum over the cores."""
    return seconds(call, times, time.process_time)


def processor():
    """The name of the processor and what of bfloat16 it has. Needs Linux."""
    text = Path("/proc/cpuinfo").read_text()
    name, flags = (re.search(rf"{key}\s*: (.*)", text) for key in ("model name", "flags"))
    kinds = [word for word in flags[1].split() if "bf16" in word] if flags else []
    return " ".join([name[1] if name else "unknown processor", *kinds])


def peak_memory():
    """The most memory that this process had so far, in MiB. Needs Linux."""
    return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024


def in_new_process(function, *arguments):
    """For peak memory, which never falls, and for settings that cannot be taken back."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


def autocast(precision):
    return torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16", cache_enabled=False)


def letters_model():
    """The small letters model, with random weights."""
    model = ldm.build_letters(asdict(train.Letters(**train.SMALL[train.Letters])), ALPHABET)
    for p in model.parameters():  # also of the layers that start at zero
        p.data += 0.01 * torch.randn_like(p)
    return model


def latent_model(small=False):
    """The latent model of the thesis's size, or the small one, with random weights."""
    values = train.SMALL if small else {train.FirstStage: {}, train.Latent: {}}
    first_stage = asdict(train.FirstStage(**values[train.FirstStage]))
    settings = asdict(train.Latent(**values[train.Latent]))
    settings |= {"first_stage_settings": first_stage, "size": first_stage["size"]}
    return ldm.build_latent(settings | {"latent_scale": 1.0}, COLOURS)


def random_player(model, batch, precision, device="cpu"):
    """A diffusion model that trains on one batch of random images or latents; its settings."""
    settings = train.Latent(precision=precision, device=device)
    x, noise = torch.randn(2, batch, *model.shape, device=device)
    y = torch.arange(batch, device=device) % model.zero_label
    t = torch.randint(1, model.diffusion.T + 1, (batch,)).to(device)
    player = train.Player("model", model, lambda n, part: model.loss(x, y, t, noise).mean())
    player.parameters = [p for p in model.parameters() if p.requires_grad]
    player.optimizer = train.make_optimizer(player, settings)
    return player, settings


def update_of(model, batch, precision, device="cpu"):
    """A function that does one update with random images or latents, the average included."""
    player, settings = random_player(model, batch, precision, device)
    ema, autocast = train.EMA(model, settings.ema), train.mixed_precision(settings)

    def update():
        train.update(player, 1, settings, autocast)
        ema.update(1)

    return update


# --------------------------------------------------------------------------------------------------
# Speed of the small models
# --------------------------------------------------------------------------------------------------


def bench_training(batch=32):
    model, flops = letters_model(), FlopCounterMode(display=False)
    conv = torch.nn.Conv2d(256, 256, 3, padding=1).to(memory_format=torch.channels_last)
    large = torch.randn(8, 256, 32, 32).to(memory_format=torch.channels_last)
    with flops:
        update_of(model, batch, "float32")()
    print(f"training letters, batch {batch}, and its share of the peak of a large convolution")
    for precision, kind in (("float32", torch.float32), ("bf16", torch.bfloat16)):
        conv, large = conv.to(kind), large.to(kind)
        taken = seconds(update_of(model, batch, precision))
        with torch.no_grad():
            peak = 2 * large.numel() * 256 * 9 / seconds(lambda: conv(large))  # noqa: B023
        share = f"{flops.get_total_flops() / taken / peak:.0%} of {peak / 1e9:.0f} Gflop/s"
        print(f"    {precision}: {batch / taken:.0f} images/s, {share}", flush=True)


def bench_sampling(against=None, batch=16, steps=50):
    print(f"sampling, PLMS {steps}, scale 2, batch {batch}")
    for name, model in (("letters", letters_model()), ("latents", latent_model(small=True))):
        for precision in PRECISIONS:
            taken, inside = sampling_times(model.eval(), batch, steps, precision)
            rate = f"{batch / taken:.1f} images/s, {inside / taken:.1%} of the time in the network"
            print(f"    {name}, {precision}: {rate}", flush=True)
    x, alpha_bar = torch.randn(16, 4, 32, 32), Diffusion(linear_schedule()).alpha_bar
    times = timesteps(1000, steps)
    ours = seconds(lambda: deque(plms(lambda x, t: 0.1 * x, x, times, alpha_bar), maxlen=0))
    print(f"    16 latents, a network that takes no time: {1000 * ours:.1f} ms")
    if against:
        print(f"    the same, PNDM of diffusers: {1000 * seconds(lambda: pndm(x, steps)):.1f} ms")


def sampling_times(model, batch, steps, precision):
    """Seconds of sampling a batch, and how many of them the network takes."""
    entered, left, y = [], [], np.arange(batch) % model.zero_label
    before = model.unet.register_forward_pre_hook(lambda *_: entered.append(time.perf_counter()))
    after = model.unet.register_forward_hook(lambda *_: left.append(time.perf_counter()))
    if precision == "bf16":
        model.compute_in_bf16()
    start = time.perf_counter()
    deque(denoise(model, y, range(batch), steps=steps, guide_above=0.0), maxlen=0)
    taken = time.perf_counter() - start
    before.remove()
    after.remove()
    return taken, sum(left) - sum(entered)


def pndm(x, steps):
    from diffusers import PNDMScheduler

    scheduler = PNDMScheduler(skip_prk_steps=True)
    scheduler.set_timesteps(steps)
    for t in scheduler.timesteps:
        x = scheduler.step(0.1 * x, t, x).prev_sample


KINDS = {  # where the time goes -> words in the names of torch's operators, the first that fits
    "convolutions": ("convolution",),
    "products": ("mm", "attention", "softmax"),  # of matrices
    "norms": ("norm",),
    "copies": ("copy", "clone", "cat", "contiguous"),  # and casts
}


def bench_profile():
    """Where the time of an update goes. One thread: with more, the profiler sees only the first."""
    torch.set_num_threads(1)
    print(f"{'an update on one core':34} seconds  " + "  ".join([*KINDS, "others", "optimizer"]))
    with tempfile.TemporaryDirectory() as folder:
        data.paint_set(Path(folder, "set"), count=64)
        paintings = {"data": f"{folder}/set"}
        latents = paintings | {"first_stage": "assets/first_stage.pt"}
        for name, more in (("letters", {}), ("vqgan", paintings), ("ldm", latents)):
            for precision in PRECISIONS:
                typed = {"model": "small", "device": "cpu", "precision": precision} | more
                settings = train.new_settings(train.STAGES[name].Settings, typed)
                stage = train.STAGES[name](settings)
                stage.start(resumed=False)
                players, _ = train.ready(stage)
                print_profile(f"{name}, small, {precision}", players[0], settings)
    for precision in PRECISIONS:
        player, settings = random_player(latent_model(), 1, precision)
        print_profile(f"ldm, thesis, batch 1, {precision}", player, settings)


def print_profile(title, player, settings, updates=3):
    """One line: the mean seconds of some updates, and the share of each kind of work."""
    spent, optimizer = dict.fromkeys([*KINDS, "others"], 0.0), 0.0
    train.update(player, 0, settings, train.mixed_precision(settings))
    for n in range(1, 1 + updates):
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            with train.mixed_precision(settings):
                loss = player.loss(n, train.WHOLE)
            loss.backward()
        for event in profiler.key_averages():
            fits = (kind for kind, words in KINDS.items() if any(w in event.key for w in words))
            spent[next(fits, "others")] += event.self_cpu_time_total / 1e6
        start = time.perf_counter()
        torch.nn.utils.clip_grad_norm_(player.parameters, 1.0)
        player.optimizer.step()
        player.optimizer.zero_grad()
        optimizer += time.perf_counter() - start
    spent["optimizer"] = optimizer
    total = sum(spent.values())
    shares = "  ".join(f"{time / total:{len(kind)}.0%}" for kind, time in spent.items())
    print(f"    {title:30} {total / updates:7.2f}  {shares}", flush=True)


def bench_packing(count=400_000):
    image = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    names, rows = [str(i) for i in range(count)], np.random.default_rng(0).integers(0, count, 512)
    with tempfile.TemporaryDirectory() as folder:
        packed, start = Path(folder, "set"), time.perf_counter()
        how = {"size": 32}, ALPHABET, names, np.arange(count), lambda i: (image, i % 26)
        found = data.pack(packed, *how)
        rate = count / (time.perf_counter() - start)
        opening, batch = seconds(lambda: data.open_set(packed)), seconds(lambda: found.batch(rows))
    print(f"packing {count:,} images of 32 x 32: {rate:,.0f} images/s; ", end="")
    print(f"opening them: {1000 * opening:.1f} ms; a batch of 512: {1000 * batch:.1f} ms")


# --------------------------------------------------------------------------------------------------
# Speed and memory of the thesis's sizes
# --------------------------------------------------------------------------------------------------

PARAMETERS = 394_984_196  # of the thesis's U-Net
OURS = {  # a row of the table -> what is switched on
    "ours, torch's defaults, float32": (),
    "ours, float32": ("tune",),
    "ours, float32, activations computed again": ("tune", "again"),
    "ours, bf16": ("tune", "bf16"),
    "ours, bf16, weights cast once, to sample": ("tune", "bf16", "once"),
}
THEIRS = {
    "diffusers, float32": ("diffusers",),
    "diffusers, tuned as ours, float32": ("diffusers", "tune"),
    "diffusers, bf16": ("diffusers", "bf16"),
}


def bench_unet(against=None, rounds=1):
    print_unets((THEIRS if against else {}) | OURS, rounds)
    fused, default = (in_new_process(adamw_time, fused) for fused in (True, False))
    print(f"AdamW on as many, CPU time: fused {fused:.2f} s, torch's default {default:.2f} s")


def bench_compile(rounds=1):
    name = "ours, bf16"
    print_unets({name: OURS[name], f"{name}, torch.compile": (*OURS[name], "compile")}, rounds)


def print_unets(rows, rounds):
    title = f"U-Net of {PARAMETERS:,} parameters, batch 2, CPU time"
    print(f"{title:50} forward, s (ratio)  + backward, s (ratio)  peak, MiB")
    print_ratios(rows, unet_times, rounds)


def print_ratios(rows, measure, rounds):
    """A line per row: medians of two times, each with its ratio to the first row, and what else
    `measure` returns. Every round measures all rows, each in a new process."""
    results = {name: [] for name in rows}
    for _ in trange(rounds, unit="round", leave=False, disable=None):
        for name, on in rows.items():
            results[name].append(in_new_process(measure, on))
    results = {name: np.median(found, axis=0) for name, found in results.items()}
    first = next(iter(results.values()))
    for name, (one, two, *more) in results.items():
        times = f"{one:10.2f} ({one / first[0]:4.2f})  {two:13.2f} ({two / first[1]:4.2f})"
        print(f"    {name:46} {times}" + "".join(f"  {value:9,.0f}" for value in more))


def unet_times(on):
    """CPU seconds of a forward pass, and of forward and backward; peak memory in MiB."""
    if "tune" in on:
        data.tune("cpu")
    x, t, context = torch.randn(2, 4, 32, 32), torch.tensor([500, 100]), torch.randn(2, 1, 512)
    if "diffusers" in on:
        network = their_unet()
    else:
        network = latent_unet(256, (1, 2, 4), 2, 4, 512).to(memory_format=torch.channels_last)
        x = x.contiguous(memory_format=torch.channels_last)
    assert sum(p.numel() for p in network.parameters()) == PARAMETERS
    if "again" in on:
        train.checkpoint_activations(network)
    if "once" in on:
        ldm.LabelledDiffusion(network, linear_schedule(), [], ()).compute_in_bf16()
    if "compile" in on:
        network.compile()

    def forward():
        with autocast("bf16" if "bf16" in on else "float32"):
            if "diffusers" in on:
                return network(x, t, context).sample
            return network(x, t, context=context)

    def both():
        network.zero_grad()
        forward().float().square().mean().backward()

    taken = cpu_seconds(torch.no_grad()(forward))
    return taken, math.nan if "once" in on else cpu_seconds(both), peak_memory()


def their_unet():
    from diffusers import UNet2DConditionModel

    channels = {"block_out_channels": (256, 512, 1024), "layers_per_block": 2}
    attention = {"attention_head_dim": (8, 16, 32), "cross_attention_dim": 512}
    down, up = ("CrossAttnDownBlock2D",) * 3, ("CrossAttnUpBlock2D",) * 3
    blocks = {"down_block_types": down, "up_block_types": up}
    return UNet2DConditionModel(32, 4, 4, **channels, **attention, **blocks)


def adamw_time(fused):
    weights = [torch.zeros(PARAMETERS // 600, requires_grad=True) for _ in range(600)]
    for p in weights:
        p.grad = torch.full_like(p, 1e-3)
    return cpu_seconds(torch.optim.AdamW(weights, 1e-4, fused=fused).step, 5)


def bench_latent():
    for precision in PRECISIONS:
        update, mib, picture = in_new_process(latent_times, precision)
        print(
            f"latent model, {precision}: an update at batch 1 {update:.1f} s, peak memory ", end=""
        )
        print(
            f"{mib:,.0f} MiB; a picture of 256 x 256, PLMS 10, scale 2: {picture:.1f} s", flush=True
        )


def latent_times(precision):
    """Seconds of the second update, peak memory in MiB, seconds of a picture."""
    data.tune("cpu")
    model = latent_model()
    update = update_of(model, 1, precision)
    update()
    start = time.perf_counter()
    update()
    taken, mib = time.perf_counter() - start, peak_memory()
    if precision == "bf16":
        model.compute_in_bf16()
    start = time.perf_counter()
    generate(model.eval(), "blue", steps=10, progress=False)
    return taken, mib, time.perf_counter() - start


def bench_first_stage(against=None, rounds=1):
    title = "first stage of the published size, 256 x 256, CPU time"
    print(f"{title:50}  encode, s (ratio)      decode, s (ratio)")
    names = ("diffusers", "ours") if against else ("ours",)
    cases = [(name, precision) for precision in PRECISIONS for name in names]
    print_ratios({", ".join(case): case for case in cases}, first_stage_times, rounds)


@torch.no_grad()
def first_stage_times(case):
    """CPU seconds of encoding and of decoding one image."""
    (name, precision), x = case, torch.rand(1, 3, 256, 256) * 2 - 1
    if name == "diffusers":
        model = their_first_stage()
        encode, decode = (lambda: model.encode(x).latents), (lambda z: model.decode(z).sample)
    else:
        data.tune("cpu")
        model = VQGAN().eval().to(memory_format=torch.channels_last)
        encode, decode = (lambda: model.encode(x)), model.decode
    assert sum(p.numel() for p in model.parameters()) == 67_717_295
    with autocast(precision):
        z = encode().float()
        return cpu_seconds(encode), cpu_seconds(lambda: decode(z))


def their_first_stage():
    from diffusers import VQModel

    down, up = "DownEncoderBlock2D", "UpDecoderBlock2D"
    blocks = {"down_block_types": (down, down, down, f"Attn{down}")}
    blocks |= {"up_block_types": (f"Attn{up}", up, up, up), "layers_per_block": 2}
    channels = {"block_out_channels": (128, 256, 256, 512), "latent_channels": 4}
    codes = {"num_vq_embeddings": 16384, "vq_embed_dim": 4}
    return VQModel(sample_size=256, **blocks, **channels, **codes).eval()


# --------------------------------------------------------------------------------------------------
# 4.4.2, 4.4.3, 4.6  Quality: what fewer steps and larger scales cost
# --------------------------------------------------------------------------------------------------


class Mixture:
    """Data 0.4 N(-0.7, 0.1^2) + 0.6 N(0.5, 0.25^2). All about x_t is known exactly."""

    w, m, s = torch.tensor([[0.4, 0.6], [-0.7, 0.5], [0.1, 0.25]], dtype=torch.float64)
    alpha_bar = Diffusion(linear_schedule()).alpha_bar

    def law(self, t):
        """Mean and variance of the two Gaussians at t, (2,) each."""
        a = self.alpha_bar[t]
        return a.sqrt() * self.m, a * self.s**2 + 1 - a

    def log_f(self, x, t):
        """log f(y | x_t, t), where y is the Gaussian that x_t comes from. x: (B,) -> (B, 2)."""
        mean, var = self.law(t)
        return (self.w.log() - var.log() / 2 - (x[:, None] - mean) ** 2 / (2 * var)).log_softmax(1)

    def eps(self, x, t):
        """The exact eps(x_t, t). x: (B,) -> (B,)."""
        mean, var = self.law(t)
        each = (1 - self.alpha_bar[t]).sqrt() * (x[:, None] - mean) / var
        return (self.log_f(x, t).exp() * each).sum(1)

    def quantiles(self, t, n):
        """The n values of x_t at the probabilities 1/2n, 3/2n, ..., by bisection."""
        mean, var = self.law(t)
        p = (torch.arange(n, dtype=torch.float64) + 0.5) / n
        low, high = torch.full_like(p, -9), torch.full_like(p, 9)
        for _ in range(60):
            x = (low + high) / 2
            below = (self.w * torch.special.ndtr((x[:, None] - mean) / var.sqrt())).sum(1) < p
            low, high = torch.where(below, x, low), torch.where(below, high, x)
        return x


NAMES = {"ddpm": "DDPM", "ddim": "DDIM", "plms": "PLMS", "dpm": "DPM-Solver++ 2M"}


def bench_solvers(each=4):
    """Errors on the mixture by evaluations of the network, recognised letters by steps."""
    lines = {title: [mixture_errors(name)] for name, title in NAMES.items()}
    title = "Error on a mixture of two Gaussians"
    pictures = [chart(lines, title, "evaluations", "mean distance of sorted values")]
    model, y = load(ASSETS / "letters.pt").compute_in_bf16(), np.arange(26).repeat(each)
    rows, shown = [], {}
    for steps in (5, 10, 20, 50):
        for name, title in NAMES.items():
            images = generate(model, y, sampler=name, steps=steps, progress=False)
            row = {"label": f"{steps} steps", "set": title, "recognised": recognised(images, y)}
            print(f"letters, {title:15} {steps}: {row['recognised']:.1f} %", flush=True)
            rows.append(row)
            if steps <= 10:
                shown[f"{title.split()[0]} {steps}"] = images[:: 2 * each]
    pictures.append(bars(rows, "recognised", f"Letters recognised, % of {len(y)}"))
    pictures.append(grid(np.concatenate([*shown.values()]), 13, [*shown], scale=2))
    save(join(pictures), ASSETS / "solvers.png")


def mixture_errors(name, counts=(5, 10, 15, 20, 50, 100)):
    """How many evaluations a sampler needs on the mixture, and its errors.

    The error is the mean distance between sampled and exact values, both sorted (the Wasserstein
    distance). DDPM draws random samples; their number alone adds 0.002.
    """
    mixture, generator, errors = Mixture(), torch.Generator().manual_seed(0), []
    n = 200_000 if name == "ddpm" else 2000
    start, exact = mixture.quantiles(1000, n), mixture.quantiles(0, n)
    noise = [lambda: torch.randn(n, generator=generator, dtype=torch.float64)] * (name == "ddpm")
    for steps in counts:
        path = SAMPLERS[name](mixture.eps, start, timesteps(1000, steps), mixture.alpha_bar, *noise)
        *_, (_, x, _) = path
        errors.append((x.sort().values - exact).abs().mean().item())
    table = "  ".join(f"{steps}: {error:.4f}" for steps, error in zip(counts, errors))
    print(f"mixture, {NAMES[name]:15} {table}")
    return [steps + (name == "plms") for steps in counts], errors


def bench_guidance(each=8):
    model = load(ASSETS / "letters.pt").compute_in_bf16()
    guides = {"classifier-free": None, "classifier": load_classifier("runs/classifier", model)}
    real, y, shown = data.open_set("letters:validation"), np.arange(26).repeat(each), {}
    order = np.argsort(real.labels, kind="stable")
    describe("validation fonts", real.images[order].repeat(3, -1), real.labels[order])
    for guidance, classifier in guides.items():
        for scale in (1, 2, 5, 15):
            name = f"{guidance} {scale}"
            images = generate(model, y, scale=scale, classifier=classifier, progress=False)
            describe(name, images, y)
            shown[name] = images[:: 2 * each]
    save(grid(np.concatenate([*shown.values()]), 13, [*shown], scale=2), ASSETS / "guidance.png")


def describe(name, images, y):
    """Recognised letters, and the mean of the letters' variety. y: labels in rising order."""
    variety = fid.variety(images.reshape(26, -1, *images.shape[1:])).mean()
    print(f"{name}: {recognised(images, y):.1f} % recognised, variety {variety:.1f}", flush=True)


@torch.no_grad()
def recognised(images, y):
    """Per cent of the images (N, 32, 32, 3) in which the letters classifier finds the label."""
    network = fid.letters_classifier()
    network.load_state_dict(torch.load(ASSETS / "letters_classifier.pt", weights_only=True))
    found = network.float().eval()(data.to_tensor(images)[:, :1]).argmax(1)
    return 100 * (found.numpy() == y).mean()


# --------------------------------------------------------------------------------------------------
# 4.7  What fits on a small GPU
# --------------------------------------------------------------------------------------------------


def bench_plan(gigabytes, precision):
    """What a process holds, and how many images it computes at a time on a GPU."""
    if not 0 < gigabytes < math.inf:
        raise UserError(f"plan {gigabytes:g}: expected the GB of a GPU, such as 11")
    model = latent_model()
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in model.first_stage.parameters())
    units = [sum(p.numel() for p in block.parameters()) for block in train.blocks_of(model.unet)]
    largest = max(*units, trained - sum(units))
    with autocast(precision):
        one, two = (np.array(activation_bytes(model, batch)) for batch in (1, 2))
    image = two - one
    print(f"{trained:,} parameters to train, {frozen:,} in the first stage, {precision}")
    print("an image adds {:.2f} GB, or {:.2f} with --checkpoint-activations".format(*image / 1e9))
    kinds = "".join(f"{kind:>12}" for kind in memory_per_process(1, 1, 1, "ddp"))
    print(f"{'GB per process':20}{kinds}{f'images on {gigabytes:g} GB':>20}{'checkpointed':>16}")
    cases = {f"fsdp {n}": ("fsdp", n) for n in (1, 2, 4, 8)}
    cases = {"one process, or ddp": ("ddp",)} | cases | {"fsdp, --cpu-offload": ("fsdp", 2, True)}
    for name, case in cases.items():
        held = memory_per_process(trained, largest, frozen, *case)
        cells = "".join(f"{4 * count / 1e9:12.2f}" for count in held.values())
        free = 0.92 * gigabytes * 1e9 - 4 * sum(held.values())  # CUDA and gaps take 8 %
        fit, more = np.maximum(0, (free - (one - image)) // image).astype(int)
        print(f"{name:20}{cells}{fit:20}{more:16}")


def memory_per_process(trained, largest, frozen, strategy, processes=1, offload=False):
    """E58, E59: what a process holds whatever the batch, by kind, in numbers of 4 bytes.

    trained: parameters to train; largest: those of the largest unit of `train.shard`; frozen:
    parameters of the first stage. FSDP holds a share of everything. It also gathers two units, the
    one at work and the next one, and the whole gradient of one.
    """
    share = -(-trained // processes) if strategy == "fsdp" else trained
    held = {"weights": share, "gradients": share, "moments": 2 * share, "average": share}
    if offload:
        held = dict.fromkeys(held, 0)
    return held | {"gathered": 3 * largest if strategy == "fsdp" else 0, "first stage": frozen}


def activation_bytes(model, batch):
    """4.7: the bytes that a forward pass keeps for the gradient, without and with checkpointing.

    With --checkpoint-activations it keeps the input of every block and, of one block at a time,
    what lies inside.
    """
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept, inputs, inside = {}, {}, []  # address -> bytes, address -> bytes, bytes per block

    def keep(x):
        storage = x.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return x

    def enter(block, arguments):
        inputs[arguments[0].data_ptr()] = arguments[0].nbytes
        inside.append(-sum(kept.values()))

    def leave(block, arguments, output):
        inside[-1] += sum(kept.values())

    hooks = []
    for block in train.blocks_of(model.unet):
        hooks += block.register_forward_pre_hook(enter), block.register_forward_hook(leave)
    z, y = torch.randn(batch, *model.shape), torch.zeros(batch, dtype=torch.long)
    as_on_gpus = mock.patch("unet.attend", torch.nn.functional.scaled_dot_product_attention)
    with as_on_gpus, torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        loss = model.loss(z, y, torch.full_like(y, 500), torch.randn_like(z))
    del loss  # not earlier: while it lives, no address is used twice
    for hook in hooks:
        hook.remove()
    total = sum(kept.values())
    return total, total - sum(inside) + sum(inputs.values()) + max(inside)


# --------------------------------------------------------------------------------------------------
# Command line
# --------------------------------------------------------------------------------------------------

SPEED = {
    "training": bench_training,
    "sampling": bench_sampling,
    "unet": bench_unet,
    "latent": bench_latent,
    "first-stage": bench_first_stage,
    "packing": bench_packing,
}
MODES = SPEED | {
    "compile": bench_compile,
    "profile": bench_profile,
    "solvers": bench_solvers,
    "guidance": bench_guidance,
    "plan": bench_plan,
}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="mode", metavar="MODE", help="see above")
    modes = {name: commands.add_parser(name) for name in MODES}
    for name in ("sampling", "unet", "first-stage"):
        modes[name].add_argument("--against", choices=("diffusers",), help="measure it, too")
    for name in ("unet", "first-stage", "compile"):
        modes[name].add_argument("--rounds", type=int, default=1, help="medians of so many (1)")
    modes["plan"].add_argument("gigabytes", metavar="GB", type=float, help="of a GPU, such as 11")
    modes["plan"].add_argument("--precision", choices=PRECISIONS, default="float32")
    arguments = vars(parser.parse_args())
    mode, library = arguments.pop("mode"), arguments.get("against")
    if library and not importlib.util.find_spec(library):
        raise UserError(f"{library} is not installed; pip install {library}")
    print(f"{processor()}; torch {torch.__version__}, {torch.get_num_threads()} threads; ", end="")
    print(time.strftime("%Y-%m-%d"))
    data.tune("cpu")
    for function in [MODES[mode]] if mode else SPEED.values():
        function(**arguments)


if __name__ == "__main__":
    data.run_program(main)
