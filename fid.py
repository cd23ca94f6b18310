"""How close generated images are to real ones: 4.4.7, 5.1, 5.3.1, 5.4, 6.2, figures 5.5 to 5.7.

    python fid.py --real DIR --fake DIR                             compare two sets of images
    python fid.py --real DIR --fake ldm=DIR gan=DIR --per-label     figures 5.5, 5.6 and 5.7
    python fid.py --real letters:train --fake letters:validation    sets that come with the project

`data.open_set` opens the sets; their images may have any size. A distance is called FID or KID only
if it uses the features of Inception. The other features need no download.
"""

import argparse
import hashlib
import json
import math
import os
import sys
from functools import lru_cache
from itertools import islice
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import linprog
from torch import nn

import data
from data import COLOURS, UserError, label_distances, mean_colour, rgb_to_lab
from plots import bars, join, save

# --------------------------------------------------------------------------------------------------
# 4.4.7  What a first stage keeps of an image
# --------------------------------------------------------------------------------------------------


def psnr(x, x_r):
    """4.4.7: peak signal-to-noise ratio in decibels, 10 log10(2^2 / mean (x - x_r)^2).

    x, x_r: (B, 3, H, W) in [-1, 1]; x_r is clamped. Returns (B,).
    """
    error = (x - x_r.clamp(-1, 1)).square().mean((1, 2, 3))
    return 10 * torch.log10(4 / error.clamp(min=1e-10))


def total_variation(x):
    """3.2.1: mean |difference| of horizontal neighbours plus that of vertical ones, (B,), the total
    variation. x: (B, 3, H, W) in [-1, 1]."""
    x = x.clamp(-1, 1)
    return x.diff(dim=-1).abs().mean((1, 2, 3)) + x.diff(dim=-2).abs().mean((1, 2, 3))


# --------------------------------------------------------------------------------------------------
# 5.1.1, 5.3.1, 5.4.1  Frechet distance, variety, colour
# --------------------------------------------------------------------------------------------------


def frechet_distance(a, b):
    """5.1.1 (no formula is printed, E61):  |m1 - m2|^2 + Tr(C1 + C2 - 2 (C1 C2)^{1/2}).

    m and C are the mean and the covariance of the features. With C1 = F^T F and C2 = X^T X, C1 C2
    has the nonzero eigenvalues of (F X^T)(F X^T)^T. This matrix is small and symmetric: no matrix
    square root is needed, and no imaginary part can appear.
    a: (n, d), b: (m, d), arrays or tensors. Computed in float64. ValueError for fewer than 2 rows.
    """
    a, b = sorted((torch.as_tensor(x).double() for x in (a, b)), key=len)
    if len(a) < 2:
        raise ValueError(f"a covariance needs at least 2 images, not {len(a)}")
    m1, m2 = a.mean(0), b.mean(0)
    a, b = (a - m1) / math.sqrt(len(a) - 1), (b - m2) / math.sqrt(len(b) - 1)
    product = torch.linalg.qr(a, mode="r").R @ b.T  # F = R, because R^T R = a^T a
    cross = torch.linalg.eigvalsh(product @ product.T).clamp(min=0).sqrt().sum()
    distance = (m1 - m2).square().sum() + a.square().sum() + b.square().sum() - 2 * cross
    return max(0.0, distance.item())  # rounding errors can make it negative


def variety(images):
    """5.3.1, "the image variance": the mean distance between two images of the same row.

    The distance is the root of the mean squared difference of the pixel values, 0 to 255.
    images: (K, N, H, W, 3) uint8, N > 1. Returns (K,).
    """
    flat = torch.from_numpy(images).flatten(2).double()
    return np.array([(torch.pdist(row).mean() / row.shape[1] ** 0.5).item() for row in flat])


COLOUR_METRICS = ["pixels_rgb", "mean_rgb", "nearest_rgb", "pixels_lab", "mean_lab", "nearest_lab"]


def colour_distances(image, label):
    """Figures 5.6 and 5.7 (E63) for one image, in RGB and in CIE-LAB.

        pixels = mean over the pixels of |pixel - label colour|          fig. 5.6
        mean   = |mean of the pixels - label colour| <= pixels           fig. 5.7
        nearest = 1 if no other label colour is nearer to that mean, else 0

    Numbers of the two spaces cannot be compared (E64): black to white is 441.7 in RGB, 100 in LAB.
    image: (H, W, 3) uint8; label: a name in COLOURS. Returns (6,), in the order of COLOUR_METRICS.
    """
    k, numbers = list(COLOURS).index(label), []
    for space in ("rgb", "lab"):
        pixels = rgb_to_lab(image) if space == "lab" else image
        mean = label_distances(pixels.mean((0, 1), dtype=np.float64), space)  # (8,)
        distance = label_distances(pixels, space, {label: COLOURS[label]}).mean()
        numbers += [distance, mean[k], mean.argmin() == k]
    return np.array(numbers, np.float64)


def palette_distance(p, q):
    """How far palette p is from palette q, in Delta-E: the optimal transport of their shares.

        min over F >= 0 of sum_ij F_ij |p_i - q_j|,   sum_j F_ij = share of p_i, sum_i F_ij = of q_j

    F_ij is the share that moves from colour i to colour j. Shares are divided by their sum; those
    that are unknown (-1) count alike. p, q: (n, 4) and (m, 4), rows (L, a, b, share), see
    `data.palette`; rows of share 0 are no colours. Not in the thesis.
    """
    p, q = (np.asarray(x, np.float64)[np.asarray(x)[:, 3] != 0] for x in (p, q))
    n, m, shares = len(p), len(q), [np.abs(x[:, 3]) / np.abs(x[:, 3]).sum() for x in (p, q)]
    cost = np.linalg.norm(p[:, None, :3] - q[None, :, :3], axis=2)
    sums = np.vstack([np.kron(np.eye(n), np.ones(m)), np.kron(np.ones(n), np.eye(m))])
    return linprog(cost.ravel(), A_eq=sums[:-1], b_eq=np.concatenate(shares)[:-1]).fun


def mean_colour_distances(images, classes):
    """5.4.1, figure 5.7: the RGB distance |mean of the pixels - label colour|, averaged per label.

    images: (K or more, N, H, W, 3) uint8, one row per label.
    Returns (K,), or None if the labels are not those of table 4.1.
    """
    if list(classes) != list(COLOURS):
        return None
    labels = np.arange(len(classes))
    return label_distances(mean_colour(images[labels]))[labels, :, labels].mean(1)


# --------------------------------------------------------------------------------------------------
# 6.2  Metrics for small sets: kernel distance, precision and recall
# --------------------------------------------------------------------------------------------------

MOST = 10_000  # features per set that are used here, evenly spaced
CHUNK = 256  # rows of a matrix of kernels or distances that are computed at a time
NEIGHBOURS = 3
remember = lru_cache(maxsize=4)  # per tensor object: the real features are used many times


@remember
def sample(x):
    """At most MOST rows of x (n, d), evenly spaced, in float64."""
    return x[data.evenly(len(x), MOST)].double()


def kernel_sums(x, y):
    """The sums of k(x_i, y_j) over j, (m,), and over i, (n,), with KID's k = (x . y / d + 1)^3."""
    over_j, over_i = [], 0
    for part in x.split(CHUNK):
        k = (part @ y.T / y.shape[1] + 1) ** 3
        over_j.append(k.sum(1))
        over_i = over_i + k.sum(0)
    return torch.cat(over_j), over_i


@remember
def sums_within(x):
    """sum_{j != i} k(x_i, x_j) for every i. x: (n, d). Returns (n,)."""
    return kernel_sums(x, x)[0] - (x.square().mean(1) + 1) ** 3


def kernel_distance(x, y):
    """6.2: squared kernel distance (MMD^2), unbiased for any number of images, and standard error.

        mean_{i != j} k(x_i, x_j) + mean_{i != j} k(y_i, y_j) - 2 mean_{i, j} k(x_i, y_j)

    An unbiased value can be below 0. The standard error is that of the jackknife: the spread of
    the values with one image left out. If both laws are equal it is sqrt(2) too large, because the
    linear terms vanish: the mark "~" is then given too often rather than too seldom.
    x: (m, d), y: (n, d), tensors. Returns (value, standard error); the value is NaN for fewer than
    2 images, the error for fewer than 3.
    """
    x, y = sample(x), sample(y)
    m, n = len(x), len(y)
    if min(m, n) < 2:
        return math.nan, math.nan
    xx, yy, (xy, yx) = sums_within(x), sums_within(y), kernel_sums(x, y)
    value = xx.sum() / (m * (m - 1)) + yy.sum() / (n * (n - 1)) - 2 * xy.sum() / (m * n)
    variance = 0
    for own, cross, count, others in ((xx, xy, m, n), (yy, yx, n, m)):
        # the value without image i, up to a constant; 0 / 0 = NaN for 2 images
        own = (own.sum() - 2 * own) / ((count - 1) * (count - 2))
        cross = (cross.sum() - cross) / ((count - 1) * others)
        variance += (count - 1) * (own - 2 * cross).var(correction=0)
    return value.item(), variance.sqrt().item()


def squared_distances(x, y):
    """|x_i - y_j|^2, (m, n), from inner products. Rounding errors of an exact 0 become 0."""
    lengths = x.square().sum(1)[:, None] + y.square().sum(1)
    distances = lengths - 2 * x @ y.T
    return distances.where(distances > 1e-12 * lengths, 0.0)


@remember
def squared_radii(x):
    """The squared distance from every feature to its third nearest other one. (n, d) -> (n,)."""
    parts = (squared_distances(part, x) for part in x.split(CHUNK))
    return torch.cat([part.kthvalue(NEIGHBOURS + 1).values for part in parts])  # 1st: x_i itself


def precision_recall(real, fake):
    """6.2: improved precision and recall. Do generated images look real? Are all real ones covered?

    The support of a set is a union of balls. Every feature is the centre of a ball that reaches to
    its third nearest other feature. precision = share of the fake features in the support of the
    real ones; recall = share of the real features in the support of the fake ones.
    real: (m, d), fake: (n, d), tensors. Returns (precision, recall), NaN for fewer than 4 images.
    """
    real, fake = sample(real), sample(fake)
    if min(len(real), len(fake)) <= NEIGHBOURS:
        return math.nan, math.nan
    shares = []
    for points, centres in ((fake, real), (real, fake)):
        parts, radii = points.split(CHUNK), squared_radii(centres)
        inside = [(squared_distances(part, centres) <= radii).any(1) for part in parts]
        shares.append(torch.cat(inside).double().mean().item())
    return tuple(shares)


# --------------------------------------------------------------------------------------------------
# 5.1.1, 6.2  Features: functions of images (B, H, W, 3) uint8 -> (B, d)
# --------------------------------------------------------------------------------------------------

RELEASE = "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights"
INCEPTION_URL = f"{RELEASE}/pt_inception-2015-12-05-6726825d.pth"
INCEPTION_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
CLASSIFIER = data.ASSETS / "letters_classifier.pt"  # assets/make_letters_classifier.py made it


class Conv(nn.Module):
    """relu(norm(conv x)), the only kind of layer in the network."""

    def __init__(self, c_in, c_out, size, stride=1, padding="same"):
        super().__init__()
        self.conv = nn.Conv2d(c_in, c_out, size, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(c_out, eps=0.001)

    def forward(self, x):
        return F.relu(self.bn(self.conv(x)))


def average_pool(x):
    """3 x 3 means that ignore the padding. Here FID's network differs from torchvision's."""
    return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


class Mixed(nn.Module):
    """Branches with the same input; all outputs are concatenated.

    branches: name -> layers, one after the other: (channels, size) or more arguments of `Conv`.
    If the size is a dict, the layer is two layers with the same input. The branch "_pool" starts
    with the function `pool`. Layers have their published names, such as branch5x5_1, branch3x3_2a.
    """

    def __init__(self, c_in, pool, branches):
        super().__init__()
        self.pool, self.branches = pool, {}
        for branch, layers in branches.items():
            c, self.branches[branch] = c_in, []
            for i, (c_out, size, *more) in enumerate(layers, 1):
                name = f"branch{branch}_{i}" if len(layers) > 1 else f"branch{branch}"
                sizes = size if isinstance(size, dict) else {"": size}
                for suffix, side in sizes.items():
                    self.add_module(name + suffix, Conv(c, c_out, side, *more))
                self.branches[branch].append([name + suffix for suffix in sizes])
                c = c_out

    def forward(self, x):
        outputs = []
        for branch, layers in self.branches.items():
            y = self.pool(x) if branch == "_pool" else x
            for names in layers:
                y = torch.cat([getattr(self, name)(y) for name in names], 1)
            outputs.append(y)
        return torch.cat(outputs, 1)


def mixed_a(c, pool):
    three = [(64, 1), (96, 3), (96, 3)]
    branches = {"1x1": [(64, 1)], "5x5": [(48, 1), (64, 5)], "3x3dbl": three, "_pool": [(pool, 1)]}
    return Mixed(c, average_pool, branches)


def mixed_c(w):
    across, down = (1, 7), (7, 1)
    once = [(w, 1), (w, across), (192, down)]
    twice = [(w, 1), (w, down), (w, across), (w, down), (192, across)]
    branches = {"1x1": [(192, 1)], "7x7": once, "7x7dbl": twice, "_pool": [(192, 1)]}
    return Mixed(768, average_pool, branches)


def halving(c, branches):
    return Mixed(c, lambda x: F.max_pool2d(x, 3, stride=2), branches | {"_pool": []})


def mixed_e(c, pool):
    both = (384, {"a": (1, 3), "b": (3, 1)})
    three = {"3x3": [(384, 1), both], "3x3dbl": [(448, 1), (384, 3), both]}
    return Mixed(c, pool, {"1x1": [(320, 1)], **three, "_pool": [(192, 1)]})


class Inception(nn.Module):
    """5.1.1: the feature network of FID; 2048 features per image, the mean over all positions.

    x: (B, 3, H, W) in [0, 1] -> (B, 2048). Images are resized to 299 x 299 (bilinear). The names
    of the weights are those of the published file; its layer `fc` is not used.
    """

    def __init__(self):
        super().__init__()
        self.Conv2d_1a_3x3 = Conv(3, 32, 3, stride=2, padding=0)
        self.Conv2d_2a_3x3 = Conv(32, 32, 3, padding=0)
        self.Conv2d_2b_3x3 = Conv(32, 64, 3)
        self.Conv2d_3b_1x1 = Conv(64, 80, 1)
        self.Conv2d_4a_3x3 = Conv(80, 192, 3, padding=0)
        self.Mixed_5b, self.Mixed_5c = mixed_a(192, 32), mixed_a(256, 64)
        self.Mixed_5d = mixed_a(288, 64)
        three = [(64, 1), (96, 3), (96, 3, 2, 0)]
        self.Mixed_6a = halving(288, {"3x3": [(384, 3, 2, 0)], "3x3dbl": three})
        self.Mixed_6b, self.Mixed_6c = mixed_c(128), mixed_c(160)
        self.Mixed_6d, self.Mixed_6e = mixed_c(160), mixed_c(192)
        seven = [(192, 1), (192, (1, 7)), (192, (7, 1)), (192, 3, 2, 0)]
        self.Mixed_7a = halving(768, {"3x3": [(192, 1), (320, 3, 2, 0)], "7x7x3": seven})
        self.Mixed_7b = mixed_e(1280, average_pool)
        # not a slip: FID's last block takes the maximum
        self.Mixed_7c = mixed_e(2048, lambda x: F.max_pool2d(x, 3, stride=1, padding=1))
        self.fc = nn.Linear(2048, 1008)

    def forward(self, x):
        x = 2 * F.interpolate(x, (299, 299), mode="bilinear", align_corners=False) - 1
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))  # (B, 64, 147, 147)
        x = F.max_pool2d(x, 3, stride=2)
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x))  # (B, 192, 71, 71)
        x = F.max_pool2d(x, 3, stride=2)
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(x)))  # (B, 288, 35, 35)
        x = self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))
        x = self.Mixed_6e(self.Mixed_6d(x))  # (B, 768, 17, 17)
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x)))  # (B, 2048, 8, 8)
        return x.mean((2, 3))


def inception_file(download=False):
    """The weight file in torch's cache, fetched if `download`. None if it is missing."""
    path = Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION_URL.split("/")[-1]
    if download and not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(INCEPTION_URL, str(path), hash_prefix=INCEPTION_SHA256)
        except (OSError, RuntimeError) as error:
            raise UserError(f"--download: cannot fetch {INCEPTION_URL} ({error})") from error
    return path if path.exists() else None


def load_inception(path, sha256=INCEPTION_SHA256):
    """The network with the published weights. UserError if the file holds something else."""
    with open(path, "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != sha256:
        raise UserError(f"{path}: not Inception's published weights (sha256 {found[:8]}...)")
    network = Inception().eval()
    weights = torch.load(path, map_location="cpu", weights_only=True)
    network.load_state_dict(network.state_dict() | weights)  # the file lacks the norms' counters
    return network


def in_float32(network, device):
    """The network as a function of x. It computes in float32 on `device`, even inside autocast."""
    network = network.float().to(device).eval()

    @torch.no_grad()
    @torch.autocast(torch.device(device).type, enabled=False)
    @torch.backends.cudnn.flags(enabled=True, allow_tf32=False)
    def call(x):
        return network(x.to(device)).cpu()

    return call


def inception_features(network, device="cpu"):
    """5.1.1: the features of FID, (B, 2048)."""
    network = in_float32(network, device)
    return lambda images: network(images.permute(0, 3, 1, 2).float() / 255)


def letters_classifier():
    """A small network that classifies capital letters. x: (B, 1, 32, 32) in [-1, 1] -> (B, 26)."""

    def stage(c_in, c_out):
        conv = nn.Conv2d(c_in, c_out, 3, stride=2, padding=1, bias=False)
        return conv, nn.BatchNorm2d(c_out), nn.ReLU()

    head = nn.Linear(128 * 4 * 4, 64, bias=False), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 26)
    return nn.Sequential(*stage(1, 32), *stage(32, 64), *stage(64, 128), nn.Flatten(), *head)


def letters_features(path=CLASSIFIER, device="cpu"):
    """6.2: features of letters (B, 32, 32, 3) -> (B, 64): a classifier without its last layer."""
    with torch.device("meta"):  # draws no weights, so the caller's random numbers stay the same
        network = letters_classifier()
    try:
        weights = torch.load(path, map_location="cpu", weights_only=True)
        network.load_state_dict(weights, assign=True)
    except Exception as error:  # torch raises many kinds for a file of another kind
        make = "assets/make_letters_classifier.py"
        raise UserError(f"{path}: not a letters classifier; {make} makes one") from error
    network = in_float32(network[:-1], device)
    return lambda images: network(images.float().mean(3)[:, None] / 127.5 - 1)


def paintings_features(images):
    """6.2: features of abstract pictures, without download or training. (B, H, W, 3) -> (B, 130).

    100 for the colours: square roots of the shares of 4 x 5 x 5 boxes of CIE-LAB (distances are
    then Hellinger's). 30 for the details: for L, a, b at 1, 2, 4, 8 and 16 pixels, the logarithm of
    the mean squared difference of neighbours, down and across. Constant factors give both parts
    a variance of about half a unit per feature over a mix of abstract pictures.
    """
    lab = torch.from_numpy(rgb_to_lab(images.numpy())).float()  # (B, H, W, 3)
    low, width, count = torch.tensor([[0.0, -50.0, -50.0], [25.0, 20.0, 20.0], [4, 5, 5]])
    box = ((lab - low) / width).floor().clamp(min=torch.zeros(3), max=count - 1).long()
    box = (box[..., 0] * 25 + box[..., 1] * 5 + box[..., 2]).flatten(1)  # (B, N)
    shares = torch.zeros(len(lab), 100).scatter_add_(1, box, torch.ones(box.shape)) / box.shape[1]
    energies, x = [], lab.permute(0, 3, 1, 2)
    for _ in range(5):
        energies += [x.diff(dim=axis).square().mean((2, 3)) for axis in (2, 3)]
        x = F.avg_pool2d(x, 2)
    energies = (torch.cat(energies, 1) + 0.1).log()  # (B, 30)
    return torch.cat([8 * shares.sqrt(), 0.8 * (energies - 2)], 1)


FEATURES = {
    "inception": "Inception's pool features (2048), bilinear to 299: frechet is FID, kernel is KID",
    "letters": "letters classifier, last but one layer (64)",
    "paintings": "LAB histogram (100) and gradient energies at five scales (30)",
    "none": "none",
}


def offline_features(classes):
    """6.2: the features that need no download: "letters" if all classes are capital letters."""
    return "letters" if len(classes) > 1 and set(classes) <= set(data.ALPHABET) else "paintings"


def choose_features(args, classes):
    """What --features means: its name, the function of images, and the size of the images."""
    name, size = args.features, args.size or 256
    if name in ("auto", "inception"):
        if file := args.inception or inception_file(args.download):
            return "inception", inception_features(load_inception(file), args.device), size
        missing = "Inception's weights are missing; use --download (96 MB) or --inception FILE"
        if name == "inception":
            raise UserError(missing)
        name = offline_features(classes)
        print(f"note: no FID, {missing}; taking the features for {name}", file=sys.stderr)
    if name == "letters":
        if args.size not in (None, 32):
            raise UserError(f"--size {size}: the features for letters need 32; leave --size out")
        return name, letters_features(args.classifier, args.device), 32
    function = paintings_features if name == "paintings" else lambda x: torch.zeros(len(x), 0)
    return name, function, size


# --------------------------------------------------------------------------------------------------
# 5.4  The comparison of sets, as tables and bar charts
# --------------------------------------------------------------------------------------------------


def measure(name, images, features, size, batch=32):
    """One pass over a set: label -> (features (n, d) float32, colour distances (n, 6)).

    The label "all" stands for the whole set. Colour distances are NaN if the label is no colour.
    Images that cannot be decoded are left out; one line counts and names them.
    images: a `data.ImageSet`; features: a function of images.
    """
    rows, x, colours = [], [], []

    def distances(row, image):
        label = images.classes[images.labels[row]]
        return colour_distances(image, label) if label in COLOURS else [math.nan] * 6

    loaded = images.each(size, distances, name)
    while part := list(islice(loaded, batch)):
        numbers, pixels, values = zip(*part)
        x.append(features(torch.from_numpy(np.stack(pixels))))
        rows += numbers
        colours += values
    x, colours, labels = torch.cat(x), np.array(colours), images.labels[rows]
    members = {images.classes[i]: labels == i for i in np.unique(labels)} | {"all": slice(None)}
    return {label: (x[chosen], colours[chosen]) for label, chosen in members.items()}


def compare(real, fake):
    """5.4: all distances between two sets of features, and the MARKS of this comparison."""
    (value, error), (precision, recall) = kernel_distance(real, fake), precision_recall(real, fake)
    few = min(len(real), len(fake))
    return {
        "real": len(real),
        "frechet": frechet_distance(real, fake),
        "kernel": value,
        "kernel_error": error,
        "precision": precision,
        "recall": recall,
        "marks": "*" * (few <= real.shape[1])
        + "~" * (abs(value) < 2 * error)
        + "?" * (few < 100)
        + "!" * (max(len(real), len(fake)) > 2 * few),
    }


MARKS = {
    "*": "few images bias the Frechet distance upwards; compare only rows with equal counts (E61)",
    "~": "the kernel distance is within two standard errors of 0: no difference is shown",
    "?": "fewer than 100 images: chance alone moves precision and recall by 0.1 and more",
    "!": "unequal counts: the support of the larger set is finer, precision and recall fall",
}
FIGURES = {
    "figure_5_5": ["frechet"],
    "kernel_distance": ["kernel"],
    "figure_5_6": ["pixels_rgb", "pixels_lab"],
    "figure_5_7": ["mean_rgb", "mean_lab"],
}


def named_sets(items):
    """["ldm=DIR", "DIR2"] -> {"ldm": "DIR", "DIR2": "DIR2"}; a set has the name of its folder."""
    sets = {}
    for item in items:
        name, equals, path = item.partition("=")
        if not equals or Path(item).exists():
            name, path = Path(os.path.abspath(item)).name, item
        if name in sets or name == "real":
            raise UserError(f"--fake {item}: the name {name!r} is taken; use NAME={path}")
        sets[name] = path
    return sets


def evaluate(args):
    """Open, measure and compare all sets. Returns the content of evaluation.json."""
    paths = {"real": args.real} | named_sets(args.fake)
    sets = {name: data.open_set(path, args.size, pack=False) for name, path in paths.items()}
    labels = {name: [s.classes[i] for i in np.unique(s.labels)] for name, s in sets.items()}
    for name in paths if args.per_label else ():
        if labels[name] == ["all"] or {*labels[name]} != {*labels["real"]}:
            both = [f"{paths[n]} has {', '.join(labels[n])}" for n in ("real", name)]
            raise UserError(f"--per-label needs the same class folders twice; {'; '.join(both)}")
    kind, features, size = choose_features(args, labels["real"])
    groups = {name: measure(name, s, features, size, args.batch) for name, s in sets.items()}
    tables = {"own": [], "all": [], "colour": []}
    for label in [*labels["real"], "all"] if args.per_label else ["all"]:
        for name, path in paths.items():
            x, colours = groups[name][label]
            if len(x) < 2:
                raise UserError(f"{path}: {len(x)} image with label {label}; at least 2 are needed")
            row = {"label": label, "set": name, "images": len(x)}
            if not np.isnan(colours).any():
                tables["colour"].append(row | dict(zip(COLOUR_METRICS, colours.mean(0).tolist())))
            if kind != "none" and name != "real":
                tables["all"].append(row | compare(groups["real"]["all"][0], x))
                if label != "all":
                    tables["own"].append(row | compare(groups["real"][label][0], x))
    about = {"sets": paths, "kind": kind, "features": FEATURES[kind]}
    about["resize"] = f"centre square, Pillow Lanczos to {size} x {size}"
    return about | tables


def report(results, out):
    """Print the tables and the meaning of their marks; save evaluation.json and the figures."""
    print(f"features: {results['features']}; images: {results['resize']}")
    over = f"distance over {results['kind']} features to"
    titles = {"own": f"{over} the real images of the same label", "all": f"{over} all real images"}
    titles["colour"] = "distance to the label colour"
    tables = {title: results[key] for key, title in titles.items() if results[key]}
    for title, rows in tables.items():
        print(f"\n{title}")
        for row in [dict(zip(rows[0], rows[0])), *rows]:  # the names of the columns first
            label, name, *values = [f"{v:.4g}" if isinstance(v, float) else v for v in row.values()]
            cells = [f"{value:>{max(8, len(key))}}" for key, value in zip([*row][2:], values)]
            print(f"{label:10} {name:18}", *cells)
    for mark, text in MARKS.items():
        if any(mark in row["marks"] for row in results["own"] + results["all"]):
            print(mark, text)
    with data.whole_file(out / "evaluation.json") as temporary:
        plain = json.loads(json.dumps(results), parse_constant=lambda name: None)  # no NaN in JSON
        temporary.write_text(json.dumps(plain, indent=1))
    for figure, values in FIGURES.items():
        pairs = [(title, v) for title, rows in tables.items() for v in values if v in rows[0]]
        if pairs:
            charts = [bars(tables[title], value, f"{value} {title}") for title, value in pairs]
            save(join(charts), out / f"{figure}.png")
    print(f"\n{out}: evaluation.json and the figures")


# --------------------------------------------------------------------------------------------------
# Command line
# --------------------------------------------------------------------------------------------------


def parse():
    p = argparse.ArgumentParser(description="How close generated images are to real ones.")
    add, device = p.add_argument, "cuda" if torch.cuda.is_available() else "cpu"
    sets = "folder, packed folder, .npz, letters or paintings, perhaps with :train or :validation"
    kinds = "default: inception if its weights are there, else letters or paintings; none: colours"
    add("--real", required=True, metavar="SET", help=sets)
    add("--fake", required=True, nargs="+", metavar="[NAME=]SET", help="one or more sets")
    add("--per-label", action="store_true", help="also compare every label by itself")
    add("--features", choices=("auto", *FEATURES), default="auto", help=kinds)
    add("--inception", metavar="FILE", help="Inception's weights (default: torch's hub cache)")
    add("--download", action="store_true", help="fetch Inception's weights (96 MB) first")
    add("--classifier", default=CLASSIFIER, help="for the letters features (default: in assets)")
    add("--size", type=int, help="pixels per side of all images (default 256; letters 32)")
    add("--batch", type=int, default=32, help="images at a time (default 32)")
    add("--device", default=device, help=f"cuda, mps or cpu (default {device})")
    add("--out", type=Path, default="runs/evaluation", help="folder (default runs/evaluation)")
    return p.parse_args()


def main():
    args = parse()
    data.check_device(args.device)
    if args.batch < 1 or (args.size or 32) < 32:
        raise UserError("--batch must be 1 or more, --size 32 or more")
    if args.out.exists() and not args.out.is_dir():
        raise UserError(f"--out {args.out}: a file of that name is there; expected a folder")
    report(evaluate(args), args.out)


if __name__ == "__main__":
    data.run_program(main)
