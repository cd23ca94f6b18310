"""How near generated images come to real ones: sections 5.1, 5.4 and 6.2 of the thesis, figures 5.5 to 5.7.

    python fid.py --real DIR --fake DIR                              one set of images against another
    python fid.py --real DIR --fake ldm=DIR gan=DIR --per-label      figures 5.5, 5.6 and 5.7, two models side by side
    python fid.py --real letters:train --fake letters:validation     sets that come with the project

A set is a folder of images (flat, or one sub-folder a label), a packed set, or an .npz; images may have any size. Everything
goes to --out: evaluation.json, the figures as PNG. "FID" is said only of Inception's features; they need its weights (see
`inception_file`). Without them the same distances are taken over features that need no download, and named after those.
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
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from data import (
    ALPHABET,
    ASSETS,
    COLOURS,
    INK,
    PALETTE,
    PAPER,
    RULE,
    UserError,
    crop_and_resize,
    font,
    is_image,
    linear_ticks,
    load_image,
    open_image,
    open_letters,
    open_paintings,
    rgb_to_lab,
    run_program,
    subfolders,
    whole_file,
)

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
    """The feature network of FID: 2048 numbers an image, the mean of the last layer over its positions.

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
    """The weight file: `path`, else the one in torch's hub cache, fetched there (96 MB) if `download`; None if it is not there."""
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


def inception_features(network, device="cpu", size=256):
    """Features of FID, float32 whatever the device would rather do."""
    network = network.float().to(device).eval()

    def call(images):
        with torch.autocast(torch.device(device).type, enabled=False), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            return network(images.to(device).permute(0, 3, 1, 2).float() / 255)

    text = "Inception pool features (2048), bilinear to 299 as in the published tool, float32"
    return Features("inception", call, size, text, frechet="FID", kernel="KID")


# ------------------------------------------------------------------------------------------------------------------
# 5.1.1  Frechet distance
# ------------------------------------------------------------------------------------------------------------------


class Statistics:
    """Number, mean and covariance of features that arrive in batches, in float64, in memory that does not grow with their number.

    Up to d rows are kept as they are: their covariance has a rank below d, and small matrices do. More are folded into
    `scatter`, the sum of (x - mean)(x - mean)^T, d x d.
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
            x, self.rows, self.count = torch.cat(self.rows), [], 0
            self.mean, self.scatter = torch.zeros_like(x[0]), x.new_zeros(x.shape[1], x.shape[1])
        mean = x.mean(0)
        self._combine(len(x), mean, x - mean)

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
# 6.2  Metrics for small sets: kernel distance, precision and recall
# ------------------------------------------------------------------------------------------------------------------


def kernel_distance(x, y, chunk=1000):
    """Squared kernel distance (MMD^2), unbiased at any number of images, with its standard error.

        mean_{i != j} k(x_i, x_j) + mean_{i != j} k(y_i, y_j) - 2 mean_{i, j} k(x_i, y_j),     k(x, y) = (x . y / d + 1)^3

    The kernel of KID. Being unbiased, it can come out below 0. The standard error is the jackknife's: the spread of the
    values found with one image left out, which the row sums of k give at once.
    x: (m, d), y: (n, d). Returns (value, standard error), NaN with fewer than 2 (3 for the error) images.
    """
    x, y = x.double(), y.double()
    m, n, d = len(x), len(y), x.shape[1]
    if min(m, n) < 2:
        return math.nan, math.nan
    xx, yy, xy, yx = torch.zeros(m), torch.zeros(n), torch.zeros(m), torch.zeros(n)
    xx, yy, xy, yx = xx.double(), yy.double(), xy.double(), yx.double()  # sums over one argument

    def k(u, v):
        return (u @ v.T / d + 1) ** 3

    for i in range(0, m, chunk):
        rows = slice(i, i + chunk)
        xx[rows] = k(x[rows], x).sum(1) - (x[rows].square().sum(1) / d + 1) ** 3
        cross = k(x[rows], y)
        xy[rows] = cross.sum(1)
        yx += cross.sum(0)
    for i in range(0, n, chunk):
        rows = slice(i, i + chunk)
        yy[rows] = k(y[rows], y).sum(1) - (y[rows].square().sum(1) / d + 1) ** 3

    within_x, within_y, between = xx.sum() / (m * (m - 1)), yy.sum() / (n * (n - 1)), xy.sum() / (m * n)
    value = within_x + within_y - 2 * between
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


def precision_recall(real, fake, k=3, chunk=1000):
    """Improved precision and recall: is what was generated realistic, and is all that is real generated?

    The support of a set is taken as the union of balls around its features, each reaching to the k-th nearest other feature.
    precision = share of the fake features inside the support of the real ones, recall = the reverse.
    real: (m, d), fake: (n, d). Returns (precision, recall), NaN where a set has no more than k images.
    """
    real, fake = real.double(), fake.double()
    if min(len(real), len(fake)) <= k:
        return math.nan, math.nan

    def parts(x):
        return (x[i : i + chunk] for i in range(0, len(x), chunk))

    def radii(x):
        return torch.cat([squared_distances(part, x).kthvalue(k + 1).values for part in parts(x)])  # the first is x itself

    def share_inside(points, centres, radii):
        inside = sum((squared_distances(part, centres) <= radii).any(1).sum().item() for part in parts(points))
        return inside / len(points)

    return share_inside(fake, real, radii(real)), share_inside(real, fake, radii(fake))


@torch.no_grad()
def kernel_distance_of_images(images, real_features, features, batch=64):
    """5.4.1 wishes to follow the distance during training: small samples will do where the distance is unbiased.

    images: (B, H, W, 3) uint8 array or tensor, just generated; real_features: (m, d), `features` of real images, computed once;
    features: a callable as above. Returns (value, standard error) of `kernel_distance`.
    """
    images = torch.as_tensor(images)
    generated = torch.cat([features(part).cpu() for part in images.split(batch)])
    return kernel_distance(generated, real_features)
