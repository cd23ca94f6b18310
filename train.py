"""Training: sections 3.5.4, 4.4.5, 4.7 and 5.2 of the thesis.

    python train.py --stage letters                 the conditional pixel DDPM on 32 x 32 letters
    python train.py --stage letters --resume        go on after an interruption, exactly where it stopped

Everything goes to runs/<stage>: model.pt (what sample.py opens), checkpoint.pt (what --resume opens), log.csv, loss.png,
previews. A run owns no random state: the rows, t, noise and dropped labels of update n are functions of (seed, n).
"""

import argparse
import contextlib
import csv
import math
import signal
import sys
import time
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from data import UserError, chart, open_letters, rng, rows_of_update, run_program, whole_file
from ddpm import SCHEDULES, drop_labels
from ldm import build_letters, load_weights, read_checkpoint, save_model, write_checkpoint
from sample import best_device, check_device, label_grid

# ------------------------------------------------------------------------------------------------------------------
# Settings: one dataclass a stage, every field a flag
# ------------------------------------------------------------------------------------------------------------------


def flag(default, help, **more):
    return field(default=default, metadata={"help": help, **more})


@dataclass
class Letters:
    """`--stage letters`. A field that is None takes its value from `SIZES[model]`."""

    data: str | None = flag(None, "folder of class folders, or .npz (default: the embedded letters)", kind=str)
    out: str = flag("runs/letters", "run folder", resume=True)
    model: str = flag(
        "auto",
        "small (fits two CPU cores), thesis (the wide network, batch 512), auto = thesis on a GPU",
        choices=("auto", "small", "thesis"),
    )
    updates: int | None = flag(None, "how many updates to train", kind=int, resume=True)
    batch: int | None = flag(None, "images an update", kind=int)
    lr: float | None = flag(None, "peak learning rate of AdamW", kind=float)
    channels: int | None = flag(None, "width of the first level", kind=int)
    multipliers: tuple | None = flag(None, "width of every level as a multiple of it", kind=int, nargs="+")
    ema: float | None = flag(None, "decay of the averaged weights", kind=float)
    predict: str | None = flag(
        None, "eps: the loss is L_simple, as in the thesis; v: learns labels faster", kind=str, choices=("eps", "v")
    )
    blocks: int = flag(1, "residual blocks a level")
    schedule: str = flag("linear", "noise schedule", choices=tuple(SCHEDULES))
    T: int = flag(1000, "diffusion steps")
    p_uncond: float = flag(0.2, "share of labels replaced by the zero-label (4.4.3); 0 = no classifier-free training")
    flip: bool = flag(False, "mirror half of the images, as in fig. 4.8 (makes letters wrong, E41)")
    warmup: int = flag(100, "updates until the learning rate is reached")
    weight_decay: float = flag(0.01, "of AdamW")
    clip: float = flag(1.0, "largest gradient norm")
    overfit: int = flag(0, "train on so many images only, to see that it learns; 0 = all")
    seed: int = flag(0, "of the start weights, the order of the data, t, noise and dropped labels")
    precision: str = flag(
        "auto",
        "float32, bf16 autocast, or the faster one as measured at the start",
        choices=("auto", "float32", "bf16"),
    )
    compile: bool = flag(False, "torch.compile the network", resume=True)
    device: str = flag("auto", "cuda, mps, cpu, or the best there is", resume=True)
    validate_every: int = flag(250, "updates between two validation losses", resume=True)
    preview_every: int = flag(1000, "updates between two preview grids", resume=True)
    save_every: int = flag(250, "updates between two checkpoints", resume=True)


SIZES = {
    "small": {
        "updates": 3000,
        "batch": 32,
        "lr": 1e-3,
        "channels": 32,
        "multipliers": (1, 2, 3, 4),
        "ema": 0.998,
        "predict": "v",
    },
    "thesis": {
        "updates": 20_000,
        "batch": 512,
        "lr": 3e-4,
        "channels": 64,
        "multipliers": (1, 2, 4, 8),
        "ema": 0.9995,
        "predict": "eps",
    },
}
STAGES = {"letters": Letters}


def parse(arguments=None):
    """The stage's settings, which of them were typed, and whether to resume."""
    known = argparse.ArgumentParser(add_help=False)
    known.add_argument("--stage", choices=tuple(STAGES), default="letters")
    stage = known.parse_known_args(arguments)[0].stage
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--stage", choices=tuple(STAGES), required=True, help="what to train")
    parser.add_argument("--resume", action="store_true", help="go on with the run in --out")
    for f in fields(STAGES[stage]):
        name = "--" + f.name.replace("_", "-")
        default = "" if f.default is None or f.type is bool else f" (default {f.default})"
        how = {"dest": f.name, "default": argparse.SUPPRESS, "help": f.metadata["help"] + default}
        if f.type is bool:
            parser.add_argument(name, action=argparse.BooleanOptionalAction, **how)
        else:
            options = {key: f.metadata[key] for key in ("choices", "nargs") if key in f.metadata}
            parser.add_argument(name, type=f.metadata.get("kind", f.type), **options, **how)
    typed = vars(parser.parse_args(arguments))
    stage, resume = typed.pop("stage"), typed.pop("resume")
    return stage, typed, resume


def complete(settings):
    """Fill in what depends on the machine, check the numbers, and say which model and why."""
    if settings.device == "auto":
        settings.device = best_device()
    check_device(settings.device)
    gpu = settings.device != "cpu"
    if settings.model == "auto":
        settings.model = "thesis" if gpu else "small"
        print(f"--model {settings.model}: {'a GPU is there' if gpu else 'no GPU here'} (flags override it)")
    for name, value in SIZES[settings.model].items():
        if getattr(settings, name) is None:
            setattr(settings, name, value)
    settings.multipliers = tuple(settings.multipliers)
    if settings.precision == "auto":
        settings.precision = "bf16" if faster_in_bf16(settings.device) else "float32"
        print(f"--precision {settings.precision}: chosen by the speed of both, measured on this {settings.device}")
    positive = (
        "updates",
        "batch",
        "lr",
        "channels",
        "blocks",
        "T",
        "clip",
        "validate_every",
        "preview_every",
        "save_every",
    )
    for name in positive:
        if getattr(settings, name) <= 0:
            raise UserError(f"--{name.replace('_', '-')} {getattr(settings, name)}: must be more than 0")
    for name in ("seed", "overfit", "weight_decay", "warmup"):
        if getattr(settings, name) < 0:
            raise UserError(f"--{name.replace('_', '-')} {getattr(settings, name)}: must be 0 or more")
    if not 0 <= settings.p_uncond <= 1 or not 0 <= settings.ema < 1:
        raise UserError("--p-uncond must be between 0 and 1, --ema from 0 to below 1")
    if settings.channels % 16 or not 1 <= len(settings.multipliers) <= 6 or min(settings.multipliers) < 1:
        raise UserError("--channels must be a multiple of 16, --multipliers one to six positive numbers")


def faster_in_bf16(device):
    """Time a convolution forward and backward, a typical one of the small network, in float32 and under bf16 autocast."""

    def seconds(bf16):
        conv = torch.nn.Conv2d(64, 64, 3, padding=1).to(device)
        x = torch.randn(64, 64, 16, 16, device=device)
        best = math.inf
        for _ in range(5):
            start = time.perf_counter()
            with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=bf16):
                conv(x).sum().backward()
            conv.weight.grad.sum().item()  # waits for the device
            best = min(best, time.perf_counter() - start)
        return best

    return seconds(True) < 0.9 * seconds(False)


def mixed_precision(settings):
    """bf16 autocast as the settings ask. Without its cache: that would keep casts of the weights that EMA has swapped out."""
    kind = torch.device(settings.device).type
    return torch.autocast(kind, torch.bfloat16, enabled=settings.precision == "bf16", cache_enabled=False)


# ------------------------------------------------------------------------------------------------------------------
# The stage: what a loss, a validation loss and a preview are
# ------------------------------------------------------------------------------------------------------------------


class LettersStage:
    """The conditional DDPM on letters (4.4.5)."""

    def __init__(self, settings):
        self.settings = settings
        self.data = open_letters(settings.data)
        print(self.data.report())
        self.classes = self.data.classes
        self.train_rows, self.validation_rows = self.data.split()
        if not len(self.train_rows):
            raise UserError(f"{settings.data}: too few images to keep some for validation; two a class are the least")
        if settings.overfit:
            self.train_rows = self.validation_rows = self.train_rows[: settings.overfit]
        torch.manual_seed(settings.seed)
        self.model = build_letters(asdict(settings), self.classes).to(settings.device)
        if settings.compile:
            self.model.unet.compile()

    def loss(self, n):
        """The loss of update n (3.5.4), with labels dropped as in 4.4.3: a function of (seed, n) and the weights alone."""
        s = self.settings
        rows = self.train_rows[rows_of_update(s.seed, n, s.batch, len(self.train_rows))]
        draw = rng(s.seed, n, 2)
        t = torch.randint(1, s.T + 1, (s.batch,), generator=draw)  # uniform on {1..T}
        noise = torch.randn((s.batch, *self.model.shape), generator=draw)
        u, mirror = torch.rand((2, s.batch), generator=draw)
        t, noise, u, mirror = (a.to(s.device, non_blocking=True) for a in (t, noise, u, mirror))
        x, y = self.data.batch(rows, s.device)
        if s.flip:
            x = torch.where(mirror[:, None, None, None] < 0.5, x.flip(-1), x)
        return self.model.loss(x, drop_labels(y, self.model.zero_label, s.p_uncond, u), t, noise).mean()

    @torch.no_grad()
    def validate(self, most=1040, batch=260):
        """The loss over the validation images with fixed noise and fixed t, spread evenly over 1..T: runs compare."""
        spread = np.linspace(0, len(self.validation_rows) - 1, min(most, len(self.validation_rows)))
        rows = self.validation_rows[spread.astype(int)]
        draw = rng(0, 0, 3)
        t = 1 + torch.randperm(len(rows), generator=draw) * self.settings.T // len(rows)
        noise = torch.randn((len(rows), *self.model.shape), generator=draw)
        total = 0.0
        for i in range(0, len(rows), batch):
            x, y = self.data.batch(rows[i : i + batch], self.settings.device)
            t_i, noise_i = (a[i : i + batch].to(x.device) for a in (t, noise))
            total += self.model.loss(x, y, t_i, noise_i).sum().item()
        return total / len(rows)

    def preview(self, path, columns=4, steps=20):
        """One row a label, the zero-label last, at the scale the thesis chose."""
        scale = 2.0 if self.settings.p_uncond else 1.0
        picture = label_grid(self.model, columns, steps=min(steps, self.settings.T), scale=scale, progress=False)
        with whole_file(path) as temporary:
            picture.save(temporary)


# ------------------------------------------------------------------------------------------------------------------
# Averaged weights, learning rate, log
# ------------------------------------------------------------------------------------------------------------------


class EMA:
    """5.2: a running average of the parameters, and of nothing else; decay min(decay, (1 + n)/(10 + n)) after update n.

    Averaging runs alongside training and does not train (E62).
    """

    def __init__(self, model, decay):
        self.decay = decay
        self.names, self.parameters = zip(*model.named_parameters())
        self.average = [p.detach().clone() for p in self.parameters]

    def update(self, n):
        decay = min(self.decay, (1 + n) / (10 + n))
        torch._foreach_lerp_(self.average, [p.detach() for p in self.parameters], 1 - decay)

    @contextlib.contextmanager
    def averaged(self):
        """The model has the averaged weights inside this `with`."""
        raw = [p.data for p in self.parameters]
        self._put(self.average)
        try:
            yield
        finally:
            self._put(raw)

    def _put(self, values):
        for p, value in zip(self.parameters, values):
            p.data = value

    def state_dict(self):
        return dict(zip(self.names, self.average))

    def load(self, state):
        for name, average in zip(self.names, self.average):
            average.copy_(state[name])


def learning_rate(settings, n):
    """Linear warm-up, then linear decay to 0 at the last update."""
    warmup = min(1, (n + 1) / max(1, settings.warmup))
    return settings.lr * warmup * min(1, (settings.updates - n) / max(1, settings.updates - settings.warmup))


class Log:
    """log.csv. A resumed run drops the lines past its checkpoint and goes on under a new run number."""

    COLUMNS = ("run", "update", "epoch", "seconds", "lr", "train_loss", "grad_norm", "validation_loss", "validation_loss_ema")

    def __init__(self, path, run, start):
        self.path = path
        kept = [row for row in self.rows() if int(row["update"]) <= start] if run > 1 else []
        with whole_file(path) as temporary, temporary.open("w", newline="") as file:
            writer = csv.DictWriter(file, self.COLUMNS)
            writer.writeheader()
            writer.writerows(kept)

    def rows(self):
        text = self.path.read_text() if self.path.exists() else ""
        whole_lines = text[: text.rfind("\n") + 1]  # a power cut may leave half a line
        return list(csv.DictReader(whole_lines.splitlines()))

    def write(self, row):
        row = {key: f"{value:.6g}" if isinstance(value, float) else value for key, value in row.items()}
        with self.path.open("a", newline="") as file:
            csv.DictWriter(file, self.COLUMNS, restval="").writerow(row)


def draw_losses(log, path):
    """5.2: the loss chart, training and validation; interruptions stay visible as gaps."""
    rows = log.rows()
    pieces = [[row for row in rows if row["run"] == run] for run in sorted({row["run"] for row in rows}, key=int)]
    names = {"train_loss": "training", "validation_loss": "validation", "validation_loss_ema": "validation, averaged weights"}
    lines = {
        name: [
            ([int(row["update"]) for row in piece if row[column]], [float(row[column]) for row in piece if row[column]])
            for piece in pieces
        ]
        for column, name in names.items()
    }
    with whole_file(path) as temporary:
        chart(lines, "Loss", "update", "mean squared error of the prediction").save(temporary)


class Interruption:
    """Ctrl-C and SIGTERM ask for a stop after the current update; a second Ctrl-C does not wait."""

    def __init__(self):
        self.signal = None
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self)

    def __call__(self, number, frame):
        self.signal = number
        signal.signal(signal.SIGINT, signal.default_int_handler)


# ------------------------------------------------------------------------------------------------------------------
# The loop
# ------------------------------------------------------------------------------------------------------------------


def train(stage_name, typed, resume):
    out = Path(typed.get("out", STAGES[stage_name].out))
    saved = (
        read_checkpoint(out / "checkpoint.pt", {"settings", "update", "run", "seconds", "raw", "ema", "optimizer"})
        if resume
        else None
    )
    if not resume and (out / "checkpoint.pt").exists():
        raise UserError(f"{out} already holds a run: --resume goes on with it, --out DIR starts another")
    settings = restore(stage_name, saved, typed) if saved else STAGES[stage_name](**typed)
    complete(settings)

    stage = LettersStage(settings)
    model, device = stage.model, settings.device
    ema = EMA(model, settings.ema)
    optimizer = torch.optim.AdamW(
        model.parameters(), settings.lr, betas=(0.9, 0.99), weight_decay=settings.weight_decay, fused=True
    )
    start, run, before = 0, 1, 0.0
    if saved:
        load_weights(model, saved["raw"], out)
        ema.load(saved["ema"])
        optimizer.load_state_dict(saved["optimizer"])
        start, run, before = saved["update"], saved["run"] + 1, saved["seconds"]

    epoch = len(stage.train_rows) / settings.batch  # updates
    size = sum(p.numel() for p in model.parameters()) / 1e6
    print(f"{size:.1f}M parameters; {settings.updates:,} updates of {settings.batch}, {settings.updates / epoch:.1f} epochs")
    log = Log(out / "log.csv", run, start)
    autocast = mixed_precision(settings)
    sums, count = torch.zeros(2, device=device), 0  # of loss and gradient norm since the last line of the log
    clock = time.perf_counter() - before
    stop = Interruption()
    bar = tqdm(total=settings.updates, initial=start, unit="update", smoothing=0.05, disable=None)

    for n in range(start, settings.updates):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(settings, n)
        with autocast:
            loss = stage.loss(n)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip)
        optimizer.step()
        optimizer.zero_grad()
        ema.update(n + 1)
        sums += torch.stack([loss.detach(), norm.detach()])
        count += 1
        bar.update()

        done = n + 1
        stopping = stop.signal  # read once: what comes after that signal waits for the next update
        last = done == settings.updates or stopping
        save = last or done % settings.save_every == 0
        validate = not stopping and (last or done % settings.validate_every == 0)
        if not (save or validate or done % 10 == 0):
            continue
        train_loss, grad_norm = (sums / count).tolist()
        sums, count = torch.zeros_like(sums), 0
        if not math.isfinite(train_loss + grad_norm):
            bar.close()
            raise UserError(
                f"the loss or its gradient is no longer finite at update {done}; stopped without saving, "
                f"earlier checkpoints are untouched. Try a smaller --lr or --precision float32"
            )
        images = (bar.format_dict["rate"] or 0) * settings.batch
        bar.set_postfix_str(f"loss {train_loss:.4f}, {images:.0f} images/s")
        row = {"update": done, "epoch": done / epoch, "lr": learning_rate(settings, n)}
        row |= {"train_loss": train_loss, "grad_norm": grad_norm}
        with autocast:
            if validate:
                row["validation_loss"] = stage.validate()
                with ema.averaged():
                    row["validation_loss_ema"] = stage.validate()
            if done % settings.preview_every == 0 and not last:
                stage.preview(out / f"preview_{done:06d}_raw.png")
                with ema.averaged():
                    stage.preview(out / f"preview_{done:06d}.png")
        seconds = time.perf_counter() - clock
        log.write({"run": run, "seconds": seconds, **row})
        if save:
            weights = {"raw": model.state_dict(), "ema": ema.state_dict()}
            state = {"update": done, "run": run, "seconds": seconds, "optimizer": optimizer.state_dict(), **weights}
            write_checkpoint(out / "checkpoint.pt", {"settings": asdict(settings), **state})
            save_model(out / "model.pt", stage_name, asdict(settings), stage.classes, done, weights)
            draw_losses(log, out / "loss.png")
        if stopping:
            bar.close()
            print(f"stopped after update {done} and saved; to go on: {resume_command(stage_name, out)}")
            sys.exit(128 + stopping)

    bar.close()
    with autocast, ema.averaged():
        stage.preview(out / "grid.png", columns=6, steps=50)
    print(f"{out / 'grid.png'} shows every label; next: python sample.py --run {out} --text HELLO")


def restore(stage_name, saved, typed):
    """The settings of a saved run; of what was typed, only fields marked `resume` may differ."""
    settings = STAGES[stage_name](**saved["settings"])
    for f in fields(settings):
        value = typed.get(f.name, getattr(settings, f.name))
        value = tuple(value) if isinstance(value, list) else value
        if value != getattr(settings, f.name) and not f.metadata.get("resume"):
            name = "--" + f.name.replace("_", "-")
            raise UserError(f"{name} was {getattr(settings, f.name)} when this run began; another value needs a new --out DIR")
        setattr(settings, f.name, value)
    return settings


def resume_command(stage_name, out):
    where = "" if str(out) == STAGES[stage_name].out else f" --out {out}"
    return f"python train.py --stage {stage_name} --resume{where}"


def main():
    train(*parse())


if __name__ == "__main__":
    run_program(main)
