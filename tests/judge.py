"""A judge of composition: which of the painter's eight compositions does a picture have?

    python tests/judge.py train               over ten minutes -> assets/composition_judge.pt
    python tests/judge.py SET [NAME=SET ...]  judge sets against the pictures of the painter

The judge sees thumbnails of 64 x 64 pixels. Its training turns and shifts them, and permutes,
inverts and scales their channels, so it is blind to colour. For every set, the table says how
surely a composition is named, which ones appear, and how far its features are from those of
pictures that the judge never saw.
"""

import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent.parent))
import data
import fid
import painter

FILE = data.ASSETS / "composition_judge.pt"
NAMES = [composition.__name__ for composition in painter.COMPOSITIONS]


def composition(seed, label):
    """The number of the composition of `data.paint(seed, label)`: the draws that lead to it."""
    rng = np.random.default_rng([seed, label])
    colour, pigments = list(data.COLOURS.values())[label], list(painter.PIGMENTS.values())
    painter.Easel(rng, 4, [colour], data.rgb_to_lab, pigments)
    return int(rng.integers(len(NAMES)))


def judge():
    """(B, 3, 64, 64) in [-1, 1] -> logits (B, 8)."""

    def stage(c_in, c_out):
        half = nn.Conv2d(c_in, c_out, 3, stride=2, padding=1, bias=False)
        same = nn.Conv2d(c_out, c_out, 3, padding=1, bias=False)
        return [
            layer for conv in (half, same) for layer in (conv, nn.BatchNorm2d(c_out), nn.ReLU())
        ]

    widths, head = (3, 32, 64, 128, 128), (nn.Linear(128 * 16, 64), nn.ReLU(), nn.Linear(64, 8))
    stages = (layer for pair in zip(widths, widths[1:]) for layer in stage(*pair))
    return nn.Sequential(*stages, nn.Flatten(), nn.Dropout(0.2), *head)


def painted(seeds, size=256):
    """Thumbnails (N, 64, 64, 3) uint8 of painted pictures, label k for seed k, and compositions."""

    def one(seed):
        return data.fit(data.paint(seed, seed % 8, size), 64)

    pictures = tqdm(data.threaded(one, seeds), "painting", len(seeds), unit="image", disable=None)
    return np.stack(list(pictures)), np.array([composition(seed, seed % 8) for seed in seeds])


def train_judge(path, count=7000, epochs=24, batch=100):
    """Train on `count` pictures. Returns the accuracy on others."""
    x, y = painted(range(10**6, 10**6 + count))
    x, y = data.to_tensor(x), torch.from_numpy(y)
    torch.manual_seed(0)
    network, updates = judge(), epochs * count // batch
    optimizer = torch.optim.AdamW(network.parameters(), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, updates)
    order = torch.cat([torch.randperm(count) for _ in range(epochs)])
    for rows in tqdm(order.split(batch), "judge", unit="update", disable=None):
        part = x[rows]
        part = part.rot90(int(torch.randint(4, ())), (2, 3))
        part = part.flip(3) if torch.rand(()) < 0.5 else part
        left, top = torch.randint(13, (2,)).tolist()
        part = F.pad(part, (6, 6, 6, 6), mode="reflect")[:, :, top : top + 64, left : left + 64]
        channels = torch.rand(batch, 3).argsort(1)[:, :, None, None].expand(-1, -1, 64, 64)
        sign = torch.where(torch.rand(batch, 1, 1, 1) < 0.5, -1.0, 1.0)
        scale = torch.rand(batch, 3, 1, 1) * 0.6 + 0.6
        shift = torch.randn(batch, 3, 1, 1) * 0.2
        logits = network(part.gather(1, channels) * sign * scale + shift)
        F.cross_entropy(logits, y[rows], label_smoothing=0.05).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    network.eval()
    with data.whole_file(path) as temporary:
        torch.save(network.half().state_dict(), temporary)
    x, y = painted(range(2 * 10**6, 2 * 10**6 + 1000))
    with torch.no_grad():
        return (network.float()(data.to_tensor(x)).argmax(1).numpy() == y).mean()


@torch.no_grad()
def judged(images):
    """Of images (N, 64, 64, 3) uint8: probabilities (N, 8) and features (N, 64)."""
    network = judge()
    network.load_state_dict(torch.load(FILE, weights_only=True))
    network.float().eval()
    features = torch.cat([network[:-1](part) for part in data.to_tensor(images).split(256)])
    return network[-1](features).softmax(1), features


def thumbnails(name, count=512):
    """At most `count` pictures of a set, evenly spread."""
    found = data.open_set(name, 256 if name.startswith("paintings") else None, pack=False)
    rows = data.evenly(len(found.labels), count)
    return np.stack([data.fit(np.asarray(found.images[row]), 64) for row in rows])


def table(sets):
    """One row per set, compared with unseen pictures; two halves of those come first."""
    real, _ = painted(range(3 * 10**6, 3 * 10**6 + 1024))
    _, reference = judged(real[:512])
    sets = {"real": real[512:]} | sets
    print(f"{'':16} sure  frechet  kernel          precision recall  " + " ".join(NAMES))
    for name, images in sets.items():
        p, features = judged(images)
        row = fid.compare(reference, features)
        shares = np.bincount(p.argmax(1), minlength=8) / len(p)
        kernel = f"{row['kernel']:7.3f} +- {row['kernel_error']:.3f}"
        cells = f"{p.max(1).values.mean():5.2f} {row['frechet']:8.1f} {kernel}"
        cells += f" {row['precision']:9.2f} {row['recall']:6.2f}   "
        widths = [f"{share:{len(word)}.2f}" for share, word in zip(shares, NAMES)]
        print(f"{name:16}{cells}", " ".join(widths))


def main():
    if sys.argv[1:] == ["train"]:
        print(f"{FILE}: accuracy {train_judge(FILE):.1%} on unseen pictures")
        return
    names = fid.named_sets(sys.argv[1:])
    table({name: thumbnails(path) for name, path in names.items()})


if __name__ == "__main__":
    data.run_program(main)
