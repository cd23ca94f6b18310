"""How near generated images come to real ones: sections 4.4.7, 5.1, 5.3.1, 5.4 and 6.2 of the thesis, figures 5.5 to 5.7.

    python fid.py --real DIR --fake DIR                              one set of images against another
    python fid.py --real DIR --fake ldm=DIR gan=DIR --per-label      figures 5.5, 5.6 and 5.7, two models side by side
    python fid.py --real letters:train --fake letters:validation     sets that come with the project

A set is a folder of images (flat, or one sub-folder a label), a packed set, or an .npz; images may have any size. Everything
goes to --out: evaluation.json, the figures as PNG. "FID" is said only of Inception's features; they need its weights (see
`inception_file`). Without them the same distances are taken over features that need no download, and named after those.

First the metrics, in the order of the chapters; then what gives features, sets of images, and the comparison.
"""

import argparse
import hashlib
import json
import math
import os
import pickle
import sys
import tempfile
import zipfile
import zlib
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import groupby
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from data import (
    ALPHABET,
    ASSETS,
    COLOURS,
    UserError,
    bars,
    check_device,
    check_npz,
    crop_and_resize,
    is_image,
    label_distances,
    load_image,
    mean_colour,
    nearest_colour,
    open_image,
    open_letters,
    open_paintings,
    rgb_to_lab,
    run_program,
    stacked,
    subfolders,
    whole_file,
)

# ------------------------------------------------------------------------------------------------------------------
# 4.4.7  What a first stage keeps of an image
# ------------------------------------------------------------------------------------------------------------------


def psnr(x, x_r):
    """Peak signal-to-noise ratio in decibel, 10 log10(2^2 / mean (x - x_r)^2) for images in [-1, 1], with x_r clamped. (B,)"""
    return 10 * torch.log10(4 / (x - x_r.clamp(-1, 1)).square().mean((1, 2, 3)).clamp(min=1e-10))


def gradient_energy(x):
    """Mean absolute difference of neighbouring pixels, of x clamped to [-1, 1]: blur lowers it (3.2.1). (B,)"""
    x = x.clamp(-1, 1)
    return x.diff(dim=-1).abs().mean((1, 2, 3)) + x.diff(dim=-2).abs().mean((1, 2, 3))


# ------------------------------------------------------------------------------------------------------------------
# 5.1.1  Frechet distance
# ------------------------------------------------------------------------------------------------------------------


class Statistics:
    """5.1.1: number, mean and covariance of features that arrive in batches, in float64 and bounded memory.

    Up to d rows are kept as they are: their covariance has a rank below d, and small matrices do. From then on all are folded
    into `scatter`, the sum of (x - mean)(x - mean)^T, d x d, and nothing grows any more: at d = 2048 the rows and the matrix
    take 32 MiB each.
    """

    def __init__(self):
        self.count, self.rows, self.mean, self.scatter = 0, [], None, None

    def add(self, x):
        """x: (n, d)."""
        x = x.detach().cpu().double()
        if self.scatter is None:
            self.rows.append(x)
            self.count += len(x)
            if self.count <= x.shape[1]:
                return
            self.count, self.mean, self.scatter = 0, torch.zeros_like(x[0]), x.new_zeros(x.shape[1], x.shape[1])
            while len(self.rows) > 1:
                self._fold(self.rows.pop(0))
            x = self.rows.pop()
        self._fold(x)

    def merge(self, other):
        """Add what another has seen."""
        if other.scatter is None:
            for x in other.rows:
                self.add(x)
            return
        if self.scatter is None:
            rows, self.rows, self.count = self.rows, [], other.count
            self.mean, self.scatter = other.mean.clone(), other.scatter.clone()
            for x in rows:
                self.add(x)
            return
        self.scatter += other.scatter
        self._combine(other.count, other.mean)

    def _fold(self, x):
        mean = x.mean(0)
        self._combine(len(x), mean, x - mean)

    def _combine(self, n, mean, centred=None):
        """Two means become one; the scatter grows by the new rows' own and by the distance of the means."""
        total = self.count + n
        delta = mean - self.mean
        if centred is not None:
            self.scatter.addmm_(centred.T, centred)
        self.scatter.addr_(delta, delta, alpha=self.count * n / total)
        self.mean += delta * (n / total)
        self.count = total

    def moments(self):
        """mean (d,); X (n, d) with covariance X^T X, or None; covariance C (d, d), or None: one of the two is given."""
        if self.count < 2:
            raise ValueError(f"{self.count} image has no covariance")
        if self.scatter is not None:
            return self.mean, None, self.scatter / (self.count - 1)
        x = torch.cat(self.rows)
        mean = x.mean(0)
        return mean, (x - mean) / math.sqrt(self.count - 1), None


def full_rank_factor(x, cov):
    """F (r, d) of full row rank r with F^T F = C; C is x^T x, or `cov` where x is None."""
    if x is None:
        L, failed = torch.linalg.cholesky_ex(cov)
        diagonal = L.diagonal()
        if not failed and diagonal.min() > 1e-7 * diagonal.max():
            return L.T
    values, vectors = torch.linalg.eigh(cov if x is None else x @ x.T)
    kept = values > len(values) * torch.finfo(values.dtype).eps * values[-1].clamp(min=1e-300)
    vectors = vectors[:, kept]
    return vectors.T @ x if x is not None else values[kept, None].sqrt() * vectors.T


def frechet_distance(a, b):
    """5.1.1 (no formula is printed, E61):  |m1 - m2|^2 + Tr(C1 + C2 - 2 (C1 C2)^{1/2}),  a, b: Statistics.

    With C1 = F^T F, the matrix C1 C2 has the nonzero eigenvalues of F C2 F^T, which is symmetric and has the rank of C1: no
    matrix square root is needed, no imaginary part can appear, and a set of 147 images asks for a 147 x 147 matrix.
    The distance of a set from itself is 0 up to rounding; a negative result is rounding and returned as 0.
    """
    if b.count < a.count:
        a, b = b, a
    m1, x1, C1 = a.moments()
    m2, x2, C2 = b.moments()
    root = full_rank_factor(x1, C1)  # (r, d)
    if x2 is None:
        product = root @ C2 @ root.T
    else:
        product = root @ x2.T
        product = product @ product.T
    trace = sum(x.square().sum() if x is not None else C.trace() for x, C in ((x1, C1), (x2, C2)))
    cross = torch.linalg.eigvalsh(product).clamp(min=0).sqrt().sum() if len(root) else 0.0
    return max(0.0, ((m1 - m2).square().sum() + trace - 2 * cross).item())


# ------------------------------------------------------------------------------------------------------------------
# 5.3.1  What a large guidance scale costs
# ------------------------------------------------------------------------------------------------------------------


def variety(images):
    """5.3.1, "the image variance": the mean distance of two images of a row, the root of the mean squared difference of their
    values, 0 to 255. images: (K, N, H, W, 3) uint8, N > 1. Returns (K,)."""
    flat = torch.from_numpy(images).flatten(2).double()
    return np.array([(torch.pdist(row).mean() / row.shape[1] ** 0.5).item() for row in flat])


# ------------------------------------------------------------------------------------------------------------------
# 5.4.1  Colour
# ------------------------------------------------------------------------------------------------------------------

SPACES = ("rgb", "lab")
COLOUR_ORDER = {name: i for i, name in enumerate(COLOURS)}
COLOUR_METRICS = [f"{metric}_{space}" for space in SPACES for metric in ("pixels", "mean", "nearest")]


def colour_distances(image, label):
    """Figures 5.6 and 5.7 (E63) for one image, in RGB and in CIE-LAB.

        pixels = mean over the pixels of |pixel - label colour|          fig. 5.6
        mean   = |mean of the pixels - label colour| <= pixels           fig. 5.7
        nearest = 1 if no other label colour is nearer to that mean, else 0

    The two spaces have different units, black to white being 441.7 and 100: a smaller number in LAB means nothing (E64).
    image: (H, W, 3) uint8; label: a name in COLOURS. Returns six numbers, in the order of COLOUR_METRICS.
    """
    own, numbers = {label: COLOURS[label]}, []
    for space in SPACES:
        pixels = rgb_to_lab(image) if space == "lab" else image
        mean = pixels.mean((0, 1), dtype=np.float64)
        nearest = list(COLOURS)[nearest_colour(mean, space)] == label
        numbers += [label_distances(pixels, space, own).mean(), label_distances(mean, space, own).item(), nearest]
    return np.array(numbers, np.float64)


def mean_colour_distances(images, classes):
    """5.4.1, figure 5.7: the distance |mean of the pixels - label colour| in RGB, its mean over each row of images.

    images: (K or more, N, H, W, 3) uint8, one row a label. Returns (K,), or None where the labels are not those of table 4.1.
    """
    if list(classes) != list(COLOURS):
        return None
    labels = np.arange(len(classes))
    return label_distances(mean_colour(images[labels]))[labels, :, labels].mean(1)


# ------------------------------------------------------------------------------------------------------------------
# 6.2  Metrics for small sets: kernel distance, precision and recall
# ------------------------------------------------------------------------------------------------------------------


CHUNK = 256  # rows of a kernel or distance matrix at a time


def parts(x):
    return (x[i : i + CHUNK].double() for i in range(0, len(x), CHUNK))


def kernel(x, y):
    """6.2: the kernel of KID, k(x, y) = (x . y / d + 1)^3, for all pairs: (m, d), (n, d) -> (m, n)."""
    return (x @ y.T / x.shape[1] + 1) ** 3


def kernel_sums(x):
    """sum_{j != i} k(x_i, x_j) for every i."""
    all_x = x.double()
    return torch.cat([kernel(part, all_x).sum(1) - (part.square().mean(1) + 1) ** 3 for part in parts(x)])


def kernel_distance(x, y, x_sums=None, y_sums=None):
    """6.2: squared kernel distance (MMD^2), unbiased at any number of images, with its standard error.

        mean_{i != j} k(x_i, x_j) + mean_{i != j} k(y_i, y_j) - 2 mean_{i, j} k(x_i, y_j)

    Being unbiased, it can come out below 0. The standard error is the jackknife's: the spread of the values found with one
    image left out, which the row sums of k give at once.
    x: (m, d), y: (n, d); x_sums, y_sums: their `kernel_sums` where known. Returns (value, standard error), NaN for a value
    from fewer than 2 images or an error from fewer than 3.
    """
    m, n = len(x), len(y)
    if min(m, n) < 2:
        return math.nan, math.nan
    xx = kernel_sums(x) if x_sums is None else x_sums
    yy = kernel_sums(y) if y_sums is None else y_sums
    xy, yx, all_y = [], 0, y.double()  # sums over y for every x, and over x for every y
    for part in parts(x):
        k = kernel(part, all_y)
        xy.append(k.sum(1))
        yx = yx + k.sum(0)
    xy = torch.cat(xy)

    within_x, within_y = xx.sum() / (m * (m - 1)), yy.sum() / (n * (n - 1))
    value = within_x + within_y - 2 * xy.sum() / (m * n)
    if min(m, n) < 3:
        return value.item(), math.nan
    without_x = (xx.sum() - 2 * xx) / ((m - 1) * (m - 2)) + within_y - 2 * (xy.sum() - xy) / ((m - 1) * n)  # (m,)
    without_y = (yy.sum() - 2 * yy) / ((n - 1) * (n - 2)) + within_x - 2 * (yx.sum() - yx) / ((n - 1) * m)  # (n,)
    variance = sum((len(w) - 1) * w.var(correction=0) for w in (without_x, without_y))
    return value.item(), variance.sqrt().item()


def squared_distances(x, y):
    """|x_i - y_j|^2, (m, n), from inner products; what is rounding error of an exact 0 is returned as 0."""
    lengths = x.square().sum(1)[:, None] + y.square().sum(1)
    distances = lengths - 2 * x @ y.T
    return distances.where(distances > 1e-12 * lengths, 0.0)


NEIGHBOURS = 3


def squared_radii(x):
    """The squared distance of every feature to its third nearest other one; the nearest of all is itself."""
    all_x = x.double()
    return torch.cat([squared_distances(part, all_x).kthvalue(NEIGHBOURS + 1).values for part in parts(x)])


def precision_recall(real, fake, real_radii=None, fake_radii=None):
    """6.2: improved precision and recall: is what was generated realistic, and is all that is real generated?

    The support of a set is taken as the union of balls around its features, each reaching to the third nearest other feature.
    precision = share of the fake features inside the support of the real ones, recall = the reverse.
    real: (m, d), fake: (n, d); their `squared_radii` where known. Returns (precision, recall), NaN where a set has no more
    than three images.
    """
    if min(len(real), len(fake)) <= NEIGHBOURS:
        return math.nan, math.nan

    def share_inside(points, centres, radii):
        radii, centres = squared_radii(centres) if radii is None else radii, centres.double()
        return sum((squared_distances(p, centres) <= radii).any(1).sum().item() for p in parts(points)) / len(points)

    return share_inside(fake, real, real_radii), share_inside(real, fake, fake_radii)


@torch.no_grad()
def kernel_distance_of_images(images, real_features, features, batch=64):
    """5.4.1 wishes to follow the distance during training: small samples will do where the distance is unbiased.

    images: (B, H, W, 3) uint8 array or tensor, just generated; real_features: (m, d), `features` of real images, computed once;
    features: a callable as above. Returns (value, standard error) of `kernel_distance`.
    """
    images = torch.as_tensor(images)
    generated = torch.cat([features(part).cpu() for part in images.split(batch)])
    return kernel_distance(generated, real_features)


# ------------------------------------------------------------------------------------------------------------------
# 5.1.1  The Inception network of FID
# ------------------------------------------------------------------------------------------------------------------

INCEPTION_URL = "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth"
INCEPTION_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"


class Conv(nn.Module):
    """relu(norm(conv x)), the only kind of layer in the network; "same" padding unless told otherwise."""

    def __init__(self, c_in, c_out, kernel, stride=1, padding="same"):
        super().__init__()
        self.conv = nn.Conv2d(c_in, c_out, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(c_out, eps=0.001)

    def forward(self, x):
        return F.relu(self.bn(self.conv(x)))


def average(x):
    """3 x 3 means that leave the padding out: where FID's network differs from the classifier torchvision has."""
    return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


class MixedA(nn.Module):
    def __init__(self, c, pool):
        super().__init__()
        self.branch1x1 = Conv(c, 64, 1)
        self.branch5x5_1, self.branch5x5_2 = Conv(c, 48, 1), Conv(48, 64, 5)
        self.branch3x3dbl_1, self.branch3x3dbl_2, self.branch3x3dbl_3 = Conv(c, 64, 1), Conv(64, 96, 3), Conv(96, 96, 3)
        self.branch_pool = Conv(c, pool, 1)

    def forward(self, x):
        five = self.branch5x5_2(self.branch5x5_1(x))
        three = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch1x1(x), five, three, self.branch_pool(average(x))], 1)


class MixedB(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.branch3x3 = Conv(c, 384, 3, stride=2, padding=0)
        self.branch3x3dbl_1, self.branch3x3dbl_2 = Conv(c, 64, 1), Conv(64, 96, 3)
        self.branch3x3dbl_3 = Conv(96, 96, 3, stride=2, padding=0)

    def forward(self, x):
        three = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch3x3(x), three, F.max_pool2d(x, 3, stride=2)], 1)


class MixedC(nn.Module):
    def __init__(self, c, w):
        super().__init__()
        self.branch1x1 = Conv(c, 192, 1)
        self.branch7x7_1, self.branch7x7_2, self.branch7x7_3 = Conv(c, w, 1), Conv(w, w, (1, 7)), Conv(w, 192, (7, 1))
        self.branch7x7dbl_1, self.branch7x7dbl_2 = Conv(c, w, 1), Conv(w, w, (7, 1))
        self.branch7x7dbl_3, self.branch7x7dbl_4 = Conv(w, w, (1, 7)), Conv(w, w, (7, 1))
        self.branch7x7dbl_5 = Conv(w, 192, (1, 7))
        self.branch_pool = Conv(c, 192, 1)

    def forward(self, x):
        seven = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        twice = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        twice = self.branch7x7dbl_5(self.branch7x7dbl_4(twice))
        return torch.cat([self.branch1x1(x), seven, twice, self.branch_pool(average(x))], 1)


class MixedD(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.branch3x3_1, self.branch3x3_2 = Conv(c, 192, 1), Conv(192, 320, 3, stride=2, padding=0)
        self.branch7x7x3_1, self.branch7x7x3_2 = Conv(c, 192, 1), Conv(192, 192, (1, 7))
        self.branch7x7x3_3, self.branch7x7x3_4 = Conv(192, 192, (7, 1)), Conv(192, 192, 3, stride=2, padding=0)

    def forward(self, x):
        seven = self.branch7x7x3_4(self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(x))))
        return torch.cat([self.branch3x3_2(self.branch3x3_1(x)), seven, F.max_pool2d(x, 3, stride=2)], 1)


class MixedE(nn.Module):
    def __init__(self, c, pool):
        super().__init__()
        self.pool = pool
        self.branch1x1 = Conv(c, 320, 1)
        self.branch3x3_1 = Conv(c, 384, 1)
        self.branch3x3_2a, self.branch3x3_2b = Conv(384, 384, (1, 3)), Conv(384, 384, (3, 1))
        self.branch3x3dbl_1, self.branch3x3dbl_2 = Conv(c, 448, 1), Conv(448, 384, 3)
        self.branch3x3dbl_3a, self.branch3x3dbl_3b = Conv(384, 384, (1, 3)), Conv(384, 384, (3, 1))
        self.branch_pool = Conv(c, 192, 1)

    def forward(self, x):
        three, twice = self.branch3x3_1(x), self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        three = [self.branch3x3_2a(three), self.branch3x3_2b(three)]
        twice = [self.branch3x3dbl_3a(twice), self.branch3x3dbl_3b(twice)]
        return torch.cat([self.branch1x1(x), *three, *twice, self.branch_pool(self.pool(x))], 1)


class Inception(nn.Module):
    """5.1.1: the feature network of FID, 2048 numbers an image, the mean of the last layer over its positions.

    x: (B, 3, H, W) in [0, 1] -> (B, 2048). Sizes other than 299 are interpolated bilinearly, as the published tool does, whose
    names and weights these are. `fc`, the classifier's head, is in the weight file but not in use.
    """

    def __init__(self):
        super().__init__()
        self.Conv2d_1a_3x3 = Conv(3, 32, 3, stride=2, padding=0)
        self.Conv2d_2a_3x3 = Conv(32, 32, 3, padding=0)
        self.Conv2d_2b_3x3 = Conv(32, 64, 3)
        self.Conv2d_3b_1x1 = Conv(64, 80, 1)
        self.Conv2d_4a_3x3 = Conv(80, 192, 3, padding=0)
        self.Mixed_5b, self.Mixed_5c, self.Mixed_5d = MixedA(192, 32), MixedA(256, 64), MixedA(288, 64)
        self.Mixed_6a = MixedB(288)
        self.Mixed_6b, self.Mixed_6c, self.Mixed_6d = MixedC(768, 128), MixedC(768, 160), MixedC(768, 160)
        self.Mixed_6e = MixedC(768, 192)
        self.Mixed_7a = MixedD(768)
        self.Mixed_7b = MixedE(1280, pool=average)
        self.Mixed_7c = MixedE(2048, pool=lambda x: F.max_pool2d(x, 3, stride=1, padding=1))  # not a slip: FID's has a maximum
        self.fc = nn.Linear(2048, 1008)

    def forward(self, x):
        x = F.interpolate(x, (299, 299), mode="bilinear", align_corners=False)
        x = 2 * x - 1
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))  # (B, 64, 147, 147)
        x = F.max_pool2d(x, 3, stride=2)
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x))  # (B, 192, 71, 71)
        x = F.max_pool2d(x, 3, stride=2)
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(x)))  # (B, 288, 35, 35)
        x = self.Mixed_6e(self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))))  # (B, 768, 17, 17)
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x)))  # (B, 2048, 8, 8)
        return x.mean((2, 3))


def inception_file(path=None, download=False):
    """The weight file: `path`, else the one in torch's hub cache, fetched (96 MB) if `download`; None if it is not there."""
    if path:
        return Path(path)
    path = Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION_URL.split("/")[-1]
    if download and not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(INCEPTION_URL, str(path), hash_prefix=INCEPTION_SHA256)
        except (OSError, RuntimeError) as error:
            raise UserError(f"--download: {INCEPTION_URL} could not be fetched ({error})") from error
    return path if path.exists() else None


def load_inception(path, sha256=INCEPTION_SHA256):
    """The network with the published weights; UserError where the file is not the published one."""
    try:
        with open(path, "rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; expected Inception's weights, {INCEPTION_URL}") from error
    if found != sha256:
        raise UserError(f"{path}: not Inception's published weights (sha256 {found[:8]}..., expected {sha256[:8]}...)")
    network = Inception()
    counters = {name: value for name, value in network.state_dict().items() if name.endswith("num_batches_tracked")}
    network.load_state_dict(counters | torch.load(path, map_location="cpu", weights_only=True))  # old files lack the counters
    return network.eval()


# ------------------------------------------------------------------------------------------------------------------
# Features: any callable (B, H, W, 3) uint8 -> (B, d)
# ------------------------------------------------------------------------------------------------------------------


@dataclass
class Features:
    """A feature function with what a reader of its numbers must know.

    call: (B, H, W, 3) uint8 tensor -> (B, d); frechet, kernel: what the two distances over these features are called;
    size: working size of the images; text: what they are, and what is done to an image of the working size.
    """

    name: str
    call: object
    size: int
    text: str
    frechet: str = "Frechet"
    kernel: str = "kernel"

    def __call__(self, images):
        with torch.no_grad():
            return self.call(images)


def in_float32(network, device):
    """The network as a function of x that computes in float32 on `device`, whatever the device or a training loop prefers."""
    network = network.float().to(device).eval()

    def call(x):
        with (
            torch.autocast(torch.device(device).type, enabled=False),
            torch.backends.cudnn.flags(enabled=True, allow_tf32=False),
        ):
            return network(x.to(device))

    return call


def inception_features(network, device="cpu", size=256):
    """5.1.1: the features of FID."""
    network = in_float32(network, device)

    def call(images):
        return network(images.permute(0, 3, 1, 2).float() / 255)

    text = "Inception pool features (2048), bilinear to 299 as in the published tool, float32"
    return Features("inception", call, size, text, frechet="FID", kernel="KID")


def letters_classifier():
    """A small network that names capital letters; all but its last layer give 64 features. x: (B, 1, 32, 32) in [-1, 1]."""

    def stage(c_in, c_out):
        return nn.Conv2d(c_in, c_out, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(c_out), nn.ReLU()

    head = nn.Flatten(), nn.Linear(128 * 4 * 4, 64, bias=False), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 26)
    return nn.Sequential(*stage(1, 32), *stage(32, 64), *stage(64, 128), *head)


def letters_features(path=ASSETS / "letters_classifier.pt", device="cpu", size=32):
    """6.2: features for letters that need no download, the last but one layer of a letters classifier."""
    with torch.device("meta"):  # without start weights: a caller's random numbers stay as they are
        network = letters_classifier()
    try:
        network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True), assign=True)
    except (OSError, RuntimeError, EOFError, ValueError, TypeError, AttributeError, pickle.UnpicklingError) as error:
        raise UserError(f"{path}: not a letters classifier; python fid.py --train-classifier FILE makes one") from error
    network = in_float32(network[:-1], device)

    def call(images):
        return network(images.permute(0, 3, 1, 2).float().mean(1, keepdim=True) / 127.5 - 1)

    return Features("letters", call, size, f"letters classifier, last but one layer (64), {Path(path).name}")


def train_letters_classifier(path, epochs=12, batch=128, seed=0):
    """How assets/letters_classifier.pt was made: the training fonts, turned, sheared, scaled and shifted at random.

    Returns the share of letters of the validation fonts it names. Saved in half precision.
    """
    letters = open_letters()
    train, validation = letters.split()
    torch.manual_seed(seed)
    network = letters_classifier()
    updates = epochs * len(train) // batch
    optimizer = torch.optim.AdamW(network.parameters(), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, updates)
    order = torch.cat([torch.randperm(len(train)) for _ in range(epochs)]).numpy()
    for n in tqdm(range(updates), "letters classifier", unit="update", disable=None):
        x, y = letters.batch(train[order[n * batch : (n + 1) * batch]])
        A = torch.eye(2, 3) + torch.randn(batch, 2, 3) * 0.12
        x = F.grid_sample(x[:, :1] + 1, F.affine_grid(A, (batch, 1, 32, 32), align_corners=False), align_corners=False) - 1
        F.cross_entropy(network(x), y, label_smoothing=0.1).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    x, y = letters.batch(validation)
    network.eval()
    with whole_file(path) as temporary:
        torch.save(network.half().state_dict(), temporary)
    network.float()
    with torch.no_grad():
        return (network(x[:, :1]).argmax(1) == y).double().mean().item()


def paintings_features(size=256):
    """6.2: features for abstract pictures, without download or training: which colours, and how much change at which scale.

    The square roots of the shares of 4 x 5 x 5 boxes of CIE-LAB, so that distances are Hellinger's; and for L, a, b at 1, 2,
    4, 8 and 16 pixels the logarithm of the mean squared difference of neighbours, across and down. Fixed factors bring both
    parts to a variance of about half a unit a feature over assorted abstract pictures. (B, H, W, 3) uint8 -> (B, 130).
    """

    def call(images):
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

    return Features("paintings", call, size, "LAB histogram (100) and gradient energies at five scales (30)")


def offline_features(classes, size=256, device="cpu"):
    """6.2: the features that come along: those for letters where all classes are some of A to Z, else those for paintings."""
    return letters_features(device=device) if set(classes) <= set(ALPHABET) else paintings_features(size)


# ------------------------------------------------------------------------------------------------------------------
# Sets of images, decoded one by one
# ------------------------------------------------------------------------------------------------------------------


@lru_cache
def memory_map(path):
    return np.load(path, mmap_mode="r")


class Source(Dataset):
    """A set of images for the loader: every item is brought to `size` x `size` by `crop_and_resize`, the project's one resize.

    images: list of files, array (N, H, W[, C]) uint8, or the path of such an .npy; labels: (n,) numbers; classes: label names;
    places: (n,) where in `images` they are, if that is not in order.
    Names of colours are put into the order of table 4.1, others are sorted by their number.
    """

    def __init__(self, name, images, labels, classes, places=None):
        order = sorted(range(len(classes)), key=lambda i: COLOUR_ORDER.get(classes[i].lower(), len(COLOURS)))
        rank = np.argsort(order)
        self.name, self.images, self.labels = str(name), images, rank[labels]
        self.classes = [classes[i].lower() if classes[i].lower() in COLOURS else classes[i] for i in order]
        self.places = np.arange(len(labels)) if places is None else places
        self.size = None

    def __len__(self):
        return len(self.labels)

    def counts(self):
        """label -> number of images, without the labels that have none."""
        counts = np.bincount(self.labels, minlength=len(self.classes)).tolist()
        return {label: count for label, count in zip(self.classes, counts) if count}

    def rows(self, label):
        """The rows of a label in a fixed random order, so that the first few are a sample of all."""
        return np.random.default_rng(0).permutation(np.flatnonzero(self.labels == label))

    def __getitem__(self, row):
        """(image (size, size, 3) uint8, the six colour distances or NaN, width and height it had); or the UserError."""
        try:
            if isinstance(self.images, list):
                with open_image(self.images[row]) as file:
                    shape = file.size
                image = load_image(self.images[row], self.size)
            else:
                array = memory_map(self.images) if isinstance(self.images, Path) else self.images
                image = np.asarray(array[self.places[row]]).squeeze()
                shape = image.shape[1::-1]
                image = np.asarray(crop_and_resize(Image.fromarray(image), self.size).convert("RGB"))
        except UserError as error:  # an exception would reach the main process as a page of text
            return error
        label = self.classes[self.labels[row]]
        colours = colour_distances(image, label) if label in COLOURS else np.full(len(COLOUR_METRICS), np.nan)
        return torch.from_numpy(image.copy()), torch.from_numpy(colours), torch.tensor(shape)


def open_source(path, scratch):
    """The set that the user named: folder, packed set, .npz, or letters, paintings, letters:train, letters:validation, ...

    scratch: a folder for temporary files. Raises UserError where there is no such set.
    """
    name, _, part = str(path).partition(":")
    path = Path(path)
    if name in BUILT_IN and not path.exists():
        return open_built_in(path, name, part)
    if path.is_dir():
        return open_packed_folder(path) if (path / "set.json").exists() else open_tree(path)
    if path.exists():
        return open_npz(path, scratch)
    raise UserError(f"{path}: no such file or folder; python sample.py --per-label N --out DIR makes such a set")


BUILT_IN = {"letters": open_letters, "paintings": open_paintings}


def open_built_in(path, name, part):
    """A set that comes with the project, or the part of it that is trained on or not."""
    built_in = BUILT_IN[name]()
    rows = dict(zip(("train", "validation"), built_in.split())) | {"": np.arange(len(built_in.labels))}
    if part not in rows:
        raise UserError(f"{path}: expected {name}, {name}:train or {name}:validation")
    images = built_in.images
    images = Path(images.filename) if isinstance(images, np.memmap) else images
    return Source(path, images, built_in.labels[rows[part]], built_in.classes, rows[part])


def open_tree(root):
    """A flat folder of images, or one with a folder of images a label; a chain of single folders is followed down."""
    folder = root
    while True:
        files = sorted(file for file in folder.iterdir() if is_image(file))
        inside = subfolders(folder)
        if files or len(inside) != 1 or any(is_image(file) for file in inside[0].iterdir()):
            break
        folder = inside[0]
    if files:
        labelled = [sub.name for sub in inside if any(is_image(file) for file in sub.iterdir())]
        if labelled:
            raise UserError(f"{folder}: images both in it and in its folder {labelled[0]}; keep one or the other")
        return Source(root, files, np.zeros(len(files), int), ["all"])
    if not inside:
        raise UserError(f"{folder}: no images in it; expected images, or one folder of images a label")
    labels = []
    for i, sub in enumerate(inside):
        found = sorted(file for file in sub.iterdir() if is_image(file))
        if not found:
            raise UserError(f"{sub}: no images in it; remove the folder")
        files += found
        labels += [i] * len(found)
    return Source(root, files, np.array(labels), [sub.name for sub in inside])


def open_packed_folder(path):
    try:
        classes = json.loads((path / "set.json").read_text())["classes"]
        labels = np.load(path / "labels.npy")
        if len(memory_map(path / "images.npy")) != len(labels):
            raise ValueError("as many labels as images are needed")
        if not all(0 <= label < len(classes) for label in np.unique(labels)):
            raise ValueError("labels without a name")
    except (OSError, ValueError, KeyError, TypeError, EOFError) as error:
        raise UserError(f"{path}: a packed set that cannot be read ({error}); remove it and pack it again") from error
    return Source(path, path / "images.npy", labels, classes)


def open_npz(path, scratch):
    """An .npz with `images` (N, H, W[, 1 or 3]) uint8 and perhaps `labels`, names or numbers that count from A.

    The images are unpacked to the disk and read from there: the file may be larger than the memory.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            if "images.npy" not in archive.namelist():
                raise UserError(f"{path}: no array images; it holds: {', '.join(Path(n).stem for n in archive.namelist())}")
            folder = Path(tempfile.mkdtemp(dir=scratch))
            archive.extract("images.npy", folder)
        images = memory_map(folder / "images.npy")
        with np.load(path, allow_pickle=False) as file:
            labels = file["labels"] if "labels" in file.files else np.full(len(images), "all")
    except (OSError, ValueError, TypeError, EOFError, zlib.error, zipfile.BadZipFile) as error:
        raise UserError(f"{path}: not an .npz file that can be read") from error
    check_npz(path, images, labels)
    values, numbers = np.unique(labels, return_inverse=True)
    letters = labels.dtype.kind in "iu" and values.min() >= 0 and values.max() < len(ALPHABET)
    return Source(path, folder / "images.npy", numbers, [ALPHABET[v] if letters else str(v) for v in values])


# ------------------------------------------------------------------------------------------------------------------
# One pass over a set: everything that is compared
# ------------------------------------------------------------------------------------------------------------------


class Measured:
    """What is kept of a set or of one label: statistics of the features, some of the features, sums of the colour distances."""

    def __init__(self):
        self.count, self.statistics, self._kept = 0, Statistics(), []
        self.colours, self.coloured = torch.zeros(len(COLOUR_METRICS), dtype=torch.float64), 0
        self.sizes = []  # the smallest and the largest (width, height)

    @property
    def kept(self):
        """(m, d): a random sample of the features, all of them where there are few."""
        if len(self._kept) != 1:
            self._kept = [torch.cat(self._kept)] if self._kept else [torch.zeros(0, 0)]
        return self._kept[0]

    @cached_property
    def kernel_sums(self):
        return kernel_sums(self.kept)

    @cached_property
    def squared_radii(self):
        return squared_radii(self.kept) if len(self.kept) > NEIGHBOURS else None

    def add(self, features, colours, sizes, keep):
        """A batch; features: None where none are wanted. The first `keep` are kept: rows come in random order."""
        if features is not None:
            self.statistics.add(features)
            if self.count < keep:
                self._kept.append(features[: keep - self.count].float().cpu().clone())  # a view would keep the whole batch
        self.count += len(colours)
        if not colours.isnan().any():
            self.colours += colours.sum(0)
            self.coloured += len(colours)
        self.sizes = ends(self.sizes + sizes.tolist())

    def absorb(self, other, share):
        """Add another group. Of its features `share` of its number is kept: the same in all groups, so the sample is fair."""
        self.count += other.count
        self.colours += other.colours
        self.coloured += other.coloured
        self.sizes = ends(self.sizes + other.sizes)
        if other.statistics.count:
            self.statistics.merge(other.statistics)
            self._kept.append(other.kept[: round(share * other.count)].clone())

    def colour_means(self):
        """name -> mean over the images; None where not all labels are colours."""
        if not self.coloured or self.coloured < self.count:
            return None
        return dict(zip(COLOUR_METRICS, (self.colours / self.coloured).tolist()))


def ends(sizes):
    return [min(sizes), max(sizes)]


def measure(source, features, keep=10_000, batch=32, workers=0):
    """One pass over a set: an iterator of (label, Measured), label by label. features: a callable, or None for colours only."""
    rows = [(label, source.rows(i)) for i, label in enumerate(source.classes)]
    batches = [(label, part[i : i + batch].tolist()) for label, part in rows for i in range(0, len(part), batch)]
    loader = DataLoader(source, batch_sampler=[part for _, part in batches], num_workers=workers, collate_fn=collate)
    with tqdm(total=len(source), desc=source.name, unit="image", disable=None) as bar:
        loaded = zip(batches, loader)
        for label, own in groupby(loaded, key=lambda item: item[0][0]):
            group = Measured()
            for _, items in own:
                if isinstance(items, UserError):
                    raise items
                images, colours, sizes = items
                group.add(features and features(images), colours, sizes, keep)
                bar.update(len(images))
            yield label, group


def collate(items):
    """A batch, or the first error in it."""
    error = next((item for item in items if isinstance(item, UserError)), None)
    return error or [torch.stack(column) for column in zip(*items)]


def save_measured(path, groups, about):
    """label -> Measured to a file, to be compared with again without looking at an image; about: what must be the same then."""
    content = {label: vars(group) | {"statistics": vars(group.statistics)} for label, group in groups.items()}
    with whole_file(path) as temporary:
        torch.save({"about": about, "groups": content}, temporary)


def load_measured(path):
    """(label -> Measured, about) from a file of `save_measured`."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(content, dict):
            raise TypeError(type(content))
        groups = {}
        for label, saved in content["groups"].items():
            groups[label] = group = Measured()
            vars(group.statistics).update(saved.pop("statistics"))
            vars(group).update(saved)
        return groups, content["about"]
    except (OSError, RuntimeError, EOFError, ValueError, TypeError, LookupError, AttributeError, pickle.PickleError) as error:
        raise UserError(f"{path}: not a file that --save-real wrote") from error


# ------------------------------------------------------------------------------------------------------------------
# 5.4  The comparison, as table and bar charts
# ------------------------------------------------------------------------------------------------------------------


def compare(real, fake):
    """5.4: all distances between two Measured, with both counts."""
    value, error = kernel_distance(real.kept, fake.kept, real.kernel_sums, fake.kernel_sums)
    precision, recall = precision_recall(real.kept, fake.kept, real.squared_radii, fake.squared_radii)
    return {
        "images": fake.count,
        "real": real.count,
        "frechet": frechet_distance(real.statistics, fake.statistics),
        "kernel": value,
        "kernel_error": error,
        "precision": precision,
        "recall": recall,
    }


def distance_table(rows, features, d):
    """Lines of a table of rows of `compare`, and the marks that were needed."""
    marks, cells = set(), []
    for row in rows:
        few, near = min(row["images"], row["real"]), abs(row["kernel"]) < 2 * row["kernel_error"]
        mark = ("*" if few <= d else "", "~" if near else "", "?" if few < 100 else "")
        marks |= set(mark)
        cells.append(
            (
                row["label"],
                row["set"],
                f"{row['images']:,}",
                f"{row['real']:,}",
                f"{row['frechet']:.3f}{mark[0]:1}",
                f"{row['kernel']:.4f} ± {row['kernel_error']:.4f}{mark[1]:1}",
                f"{row['precision']:.2f}{mark[2]:1}",
                f"{row['recall']:.2f}{mark[2]:1}",
            )
        )
    return table(("label", "set", "images", "real", features.frechet, features.kernel, "precision", "recall"), cells), marks


def table(header, rows):
    """Rows of words as lines, the first two columns to the left, numbers to the right."""
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    return [
        "  ".join(
            cell.ljust(width) if i < 2 else cell.rjust(width) for i, (cell, width) in enumerate(zip(row, widths))
        ).rstrip()
        for row in (header, *rows)
    ]


def explain(marks, d):
    """What the marks in a table warn of."""
    text = {
        "*": f"* no more images than features ({d}) on one side: the covariance is singular and the distance biased upwards; "
        "compare only rows with equal counts (E61)",
        "~": "~ within two standard errors of 0: these counts show no difference",
        "?": "? fewer than 100 images: chance alone moves precision and recall by 0.1 and more",
    }
    return [text[mark] for mark in text if mark in marks]


def colour_table(rows):
    header = (
        "label",
        "set",
        "images",
        *(f"{metric} {space.upper()}" for space in SPACES for metric in ("5.6", "5.7", "nearest")),
    )
    cells = [
        (row["label"], row["set"], f"{row['images']:,}")
        + tuple(f"{row[name]:.0%}" if "nearest" in name else f"{row[name]:.1f}" for name in COLOUR_METRICS)
        for row in rows
    ]
    return table(header, cells)


def save_panels(path, panels):
    """Charts one above the other, as one PNG."""
    with whole_file(path) as temporary:
        stacked(panels).save(temporary)


# ------------------------------------------------------------------------------------------------------------------
# Command line
# ------------------------------------------------------------------------------------------------------------------


def parse():
    p = argparse.ArgumentParser(description="How near generated images come to real ones.")
    p.add_argument(
        "--real",
        help="real images: folder, packed set, .npz, letters or paintings[:train|:validation], or a .pt of --save-real",
    )
    p.add_argument("--fake", nargs="+", metavar="[NAME=]SET", help="generated images, one or several sets side by side")
    p.add_argument("--per-label", action="store_true", help="every label against its own real images and against all")
    p.add_argument(
        "--features",
        choices=("auto", "inception", "letters", "paintings", "none"),
        default="auto",
        help="auto = inception if its weights are there, else letters for sets of A to Z, else paintings; none = colours only",
    )
    p.add_argument("--inception", metavar="FILE", help="Inception's weights (default: in torch's hub cache)")
    p.add_argument("--download", action="store_true", help="fetch Inception's weights (96 MB) into torch's hub cache")
    p.add_argument("--classifier", metavar="FILE", help="letters classifier (default: the one that comes with the project)")
    p.add_argument("--train-classifier", metavar="FILE", help="train a letters classifier (half a minute) and do nothing else")
    p.add_argument("--size", type=int, help="working size that every image is brought to (default 256; letters 32)")
    p.add_argument("--keep", type=int, default=10_000, help="most features kept for kernel distance, precision, recall (10000)")
    p.add_argument("--save-real", metavar="FILE", help="keep what was measured of the real images, for --real FILE next time")
    p.add_argument("--batch", type=int, default=32, help="images at a time (default 32)")
    p.add_argument("--workers", type=int, help="processes that decode images (default: one a core, at most 8)")
    p.add_argument("--device", help="cuda, mps or cpu, for the features (default: cuda if it is there)")
    p.add_argument("--out", default="runs/evaluation", help="folder for evaluation.json and the figures (runs/evaluation)")
    return p.parse_args()


def choose_features(args, classes):
    """The features that --features asks for; None for none."""
    device, name = args.device or ("cuda" if torch.cuda.is_available() else "cpu"), args.features
    check_device(device)
    if name in ("auto", "inception"):
        file = inception_file(args.inception, args.download)
        if file:
            return inception_features(load_inception(file), device, args.size or 256)
        missing = "Inception's weights are not there: --download fetches them (96 MB), --inception FILE says where they are"
        if name == "inception":
            raise UserError(missing)
        name = "letters" if set(classes) <= set(ALPHABET) else "paintings"
        print(f"note: no FID, {missing}; using the features for {name}", file=sys.stderr)
    if name == "letters":
        if args.size not in (None, 32):
            raise UserError(
                f"--size {args.size}: the letters classifier takes 32 pixels; leave --size out or choose other features"
            )
        return letters_features(args.classifier or ASSETS / "letters_classifier.pt", device)
    if name == "paintings" and args.size and args.size < 32:
        raise UserError(f"--size {args.size}: these features need 32 pixels or more")
    return paintings_features(args.size or 256) if name == "paintings" else None


def check_labels(name, counts, real, per_label):
    """Refuse before anything is computed: too few images, or labels that are on one side only. counts: label -> images."""
    if sum(counts.values()) < 2:
        raise UserError(f"{name}: only {sum(counts.values())} image; a covariance needs at least 2")
    if not per_label:
        return
    if list(counts) == ["all"]:
        raise UserError(f"{name}: no labels; leave out --per-label, or put the images into one folder a label")
    single = [label for label, count in counts.items() if count < 2]
    if single:
        raise UserError(f"{name}: label {single[0]} has 1 image; --per-label needs at least 2 of every label")
    if counts.keys() != real.keys():
        missing, extra = sorted(real.keys() - counts.keys()), sorted(counts.keys() - real.keys())
        sides = [f"{who} lacks {', '.join(which)}" for who, which in ((name, missing), ("--real", extra)) if which]
        raise UserError(f"--per-label needs the same labels on both sides: {'; '.join(sides)}")


def named_sets(items):
    """["ldm=DIR", "DIR2"] -> {"ldm": "DIR", "DIR2": "DIR2"}; without a name a set is called after its folder."""
    sets = {}
    for item in items:
        name, found, path = item.partition("=")
        if not found or Path(item).exists():
            name, path = Path(os.path.abspath(item)).name, item
        if name in sets or name == "real":
            raise UserError(f"--fake {item}: the name {name!r} is taken; give another with NAME={path}")
        sets[name] = path
    return sets


def evaluate(args, scratch):
    """Open, check, measure, compare. Returns the features and what was found, a dict for evaluation.json."""
    names = named_sets(args.fake)
    fakes = {name: open_source(path, scratch) for name, path in names.items()}
    if Path(args.real).suffix == ".pt":
        groups, measured_with = load_measured(args.real)
        counts = {label: group.count for label, group in groups.items()}
    else:
        source, groups = open_source(args.real, scratch), None
        counts = source.counts()
    check_labels(args.real, counts, counts, args.per_label)
    for name, fake in fakes.items():
        check_labels(names[name], fake.counts(), counts, args.per_label)

    features = choose_features(args, counts)
    size = features.size if features else args.size or 256
    about = {"features": features.text if features else "none", "resize": f"centre square, Pillow Lanczos to {size} x {size}"}
    about |= {"keep": args.keep}

    def measured(source):
        source.size = size
        few = len(source) < 500  # starting processes would take longer
        workers = args.workers if args.workers is not None else 0 if few else min(8, os.cpu_count() or 1)
        return measure(source, features, args.keep, args.batch, workers)

    if groups is None:
        groups = dict(measured(source))
    elif measured_with != about:
        raise UserError(f"{args.real}: measured with {measured_with}, not with {about}")
    if args.save_real:
        save_measured(args.save_real, groups, about)
    everything = {"real": Measured()}
    for group in groups.values():
        everything["real"].absorb(group, min(1, args.keep / sum(counts.values())))

    own, against_all = [], []  # the two columns of figure 5.5
    colours = [colour_row("real", label, group) for label, group in groups.items() if args.per_label]
    for name, fake in fakes.items():
        everything[name] = Measured()
        for label, group in measured(fake):
            everything[name].absorb(group, min(1, args.keep / len(fake)))
            if args.per_label:
                colours.append(colour_row(name, label, group))
            if args.per_label and features:
                own.append({"label": label, "set": name, **compare(groups[label], group)})
                against_all.append({"label": label, "set": name, **compare(everything["real"], group)})
        if features:
            against_all.append({"label": "all", "set": name, **compare(everything["real"], everything[name])})
    colours += [colour_row(name, "all", group) for name, group in everything.items()]
    order = [*counts, "all"]
    own, against_all, colours = (
        sorted((row for row in rows if row), key=lambda row: order.index(row["label"])) for rows in (own, against_all, colours)
    )
    return features, {
        "real": args.real,
        "sets": names,
        **about,
        "dimensions": everything["real"].kept.shape[1] if features else 0,
        "sizes": {name: group.sizes for name, group in everything.items()},
        "own": own,
        "all": against_all,
        "colour": colours,
    }


def colour_row(name, label, group):
    means = group.colour_means()
    return means and {"label": label, "set": name, "images": group.count, **means}


def report(features, found, out):
    """Tables on the terminal; evaluation.json and the figures in `out`."""
    print(f"features: {found['features']}; images: {found['resize']}")
    size = features.size if features else 0
    for name, sizes in found["sizes"].items():
        (w, h), (w_max, h_max) = sizes[0], sizes[-1]
        if (w, h) != (w_max, h_max):
            print(f"note: {name}: sizes from {w} x {h} to {w_max} x {h_max}; the centre square of each was resized")
        if min(w, h) < size:
            print(f"note: {name}: images of {w} x {h} were enlarged; details finer than that are not there to compare")
    marks, d, panels = set(), found["dimensions"], []
    for key, title in (("own", "Against the real images of the same label"), ("all", "Against all real images")):
        if found[key]:
            lines, more = distance_table(found[key], features, d)
            marks |= more
            print("", title, *lines, sep="\n")
            panels.append((found[key], title))
    for line in explain(marks, d):
        print(line)
    with whole_file(out / "evaluation.json") as temporary:
        plain = json.loads(json.dumps(found), parse_constant=lambda name: None)  # JSON has no NaN
        temporary.write_text(json.dumps(plain, indent=1))
    if panels:
        name = features.frechet if features.frechet == "FID" else f"{features.frechet} distance, features for {features.name}"
        save_panels(out / "figure_5_5.png", [bars(rows, "frechet", f"{name}: {title.lower()}") for rows, title in panels])
        name = features.kernel if features.kernel == "KID" else f"Kernel distance, features for {features.name}"
        charts = [bars(rows, "kernel", f"{name}: {title.lower()}", "kernel_error") for rows, title in panels]
        save_panels(out / "kernel_distance.png", charts)
    if found["colour"]:
        print("", "Distance from the label colour: of the pixels (fig. 5.6), of the mean (5.7); share nearest to it", sep="\n")
        print(*colour_table(found["colour"]), sep="\n")
        for figure, metric, title in ((6, "pixels", "Mean distance of the pixels"), (7, "mean", "Distance of the mean colour")):
            charts = [bars(found["colour"], f"{metric}_{s}", f"{title} from the label colour, {s.upper()}") for s in SPACES]
            save_panels(out / f"figure_5_{figure}.png", charts)


def main():
    args = parse()
    if args.train_classifier:
        share = train_letters_classifier(args.train_classifier)
        print(f"{args.train_classifier}: names {share:.1%} of the letters of the validation fonts")
        return
    if not args.real or not args.fake:
        raise UserError("--real SET and --fake SET are needed; python fid.py --help explains them")
    if args.batch < 1 or args.keep < 4 or (args.size or 8) < 8 or (args.workers or 0) < 0:
        raise UserError("--batch must be 1 or more, --keep 4 or more, --size 8 or more, --workers 0 or more")
    out = Path(args.out)
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out}: a file of that name is there; expected a folder")
    with tempfile.TemporaryDirectory() as scratch:
        features, found = evaluate(args, scratch)
    report(features, found, out)
    print(f"\n{out}: evaluation.json and the figures")


if __name__ == "__main__":
    run_program(main)
