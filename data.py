"""Sets of images with labels: section 4.2 of the thesis. Also errors and devices for all programs.

    python data.py letters --data PATH                pack a set of letters (one folder per class)
    python data.py letters --fonts DIR --out DIR      make such a set from fonts
    python data.py paintings --data DIR --out DIR     pack any folder of images, labelled by colour
    python data.py paintings --out DIR --count 20000  paint a set instead

`open_set` opens every set of images, for every program. A folder is packed once into a uint8 memory
map; training reads batches from it. Two sets come with the project, without a download: the letters
of `assets/letters.png` (400 fonts x 26 capitals) and the pictures of `painter.py`.
"""

import argparse
import contextlib
import csv
import ctypes
import hashlib
import io
import json
import os
import shutil
import sys
import tempfile
import timeit
import warnings
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageCms, ImageColor, ImageOps, PngImagePlugin, UnidentifiedImageError
from scipy.cluster.vq import kmeans2
from scipy.spatial.distance import cdist
from tqdm import tqdm

import painter

ASSETS = Path(__file__).parent / "assets"
ALPHABET = [chr(ord("A") + i) for i in range(26)]
FORMATS = Image.registered_extensions()  # suffix -> Pillow's name of the format
IMAGE_SUFFIXES = {s for s, name in FORMATS.items() if name in Image.OPEN} - {".eps", ".ps"}
SYSTEM_FOLDERS = {"__MACOSX", "@eaDir", "#recycle", "$RECYCLE.BIN", "lost+found"}
PngImagePlugin.MAX_TEXT_CHUNK = 2**26  # colour profiles may have more than Pillow's 1 MB

# --------------------------------------------------------------------------------------------------
# Files and errors, for every program of the project
# --------------------------------------------------------------------------------------------------


def cache_folder():
    """Where the programs keep what they can make again: ~/.cache, if it can be written."""
    name = "color-diffusion"
    with contextlib.suppress(OSError, RuntimeError):  # there may be no home folder
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / name
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            return folder
    return Path(tempfile.gettempdir(), name)


class UserError(Exception):
    """Something given cannot work. The message is one line: what is wrong and what to do."""


def run_program(main):
    """Run a command-line program. A UserError becomes one line on stderr and exit code 2."""
    warnings.filterwarnings("ignore", module="PIL")  # about odd metadata in image files
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # file names may be no UTF-8
    try:
        main()
        return
    except BrokenPipeError:
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
    except UserError as error:
        message = str(error)
    except OSError as error:  # such as a full disk
        message = f"{error.filename or 'a file'}: {error.strerror or error}"
    except RuntimeError as error:  # of torch
        text = str(error)
        if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            message = f"--compile does not work here ({text.strip().splitlines()[0]}); leave it out"
        elif any(words in text for words in ("out of memory", "can't allocate memory")):
            message = "not enough memory: use a smaller --batch, or train.py's --accumulate"
        else:
            raise
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


@contextlib.contextmanager
def whole_file(path):
    """Write a file or folder whole or not at all.

    Yields a temporary path beside `path`. It is renamed to `path` if the block succeeds, else
    removed. Raises UserError if the disk is full or the folder cannot be written.
    """
    path = Path(path)
    temporary = path.with_name(f".{os.getpid()}-{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        if temporary.is_file():
            with temporary.open("r+b") as file:  # Windows flushes only files that are open to write
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(
            f"cannot write {path}: {error.strerror or error}; nothing was changed"
        ) from error
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary)
        temporary.unlink(missing_ok=True)


def check_picture_name(path):
    """UserError unless Pillow can write a picture of this name."""
    if FORMATS.get(Path(path).suffix.lower()) not in Image.SAVE:
        raise UserError(f"{path}: not the name of a picture; end it with .png")


# --------------------------------------------------------------------------------------------------
# Devices and threads, for every program of the project
# --------------------------------------------------------------------------------------------------


def best_device():
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def check_device(device):
    """`device`, if this machine has it."""
    try:
        kind = torch.zeros(1, device=device).device.type
    except (RuntimeError, AssertionError):
        kind = None
    if kind not in ("cuda", "mps", "cpu"):
        raise UserError(f"--device {device}: not there on this machine")
    return device


def computes_bf16(device):
    """Whether bfloat16 is faster than float32. A GPU is asked; a CPU is timed, because some that
    have instructions for bfloat16 need twice as long with them."""
    kind = torch.device(device).type
    if kind == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    float32, bf16 = convolution_seconds() if kind == "cpu" else (1.0, 1.0)
    return bf16 < 0.9 * float32


def convolution_seconds():
    """The shortest of some times of a convolution in float32, and in bfloat16. They are timed in
    turn and with one thread, so that another program slows down both alike."""

    def work(kind):
        x, weight = torch.ones(8, 64, 32, 32, dtype=kind), torch.ones(64, 64, 3, 3, dtype=kind)
        return lambda: torch.nn.functional.conv2d(x, weight, padding=1)

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    works = [work(torch.float32), work(torch.bfloat16)]
    times = [[timeit.timeit(work, number=1) for work in works] for _ in range(12)]
    torch.set_num_threads(threads)
    return [min(column) for column in zip(*times)]


def send(x, device):
    """x on the device. A GPU fetches it from pinned memory while the program goes on."""
    x = x.pin_memory() if torch.device(device).type == "cuda" else x
    return x.to(device, non_blocking=True)


def tune(device, keep_memory=True):
    """Change two defaults of a CPU that cost the large model half its speed. Call it first of all.

    oneDNN computes matrix products instead of MKL, which has half the speed on AMD processors. The
    switch also permits bfloat16; where a processor (with AMX) makes use of that, it is put back.
    glibc returns large blocks to the system and asks for them again at every layer; `keep_memory`
    keeps them. (Not with FSDP, which gathers blocks of many sizes: they would need a third more.)
    """
    if torch.device(device).type != "cpu":
        return
    matmul = torch.backends.mkldnn.matmul
    x = torch.linspace(-1, 2, 256 * 256, dtype=torch.float64).view(256, 256)
    matmul.fp32_precision = "bf16"
    if not torch.allclose((x.float() @ x.float()).double(), x @ x, rtol=1e-5, atol=1e-3):
        matmul.fp32_precision = "ieee"
    if keep_memory:
        with contextlib.suppress(OSError, AttributeError):  # another C library than glibc
            mallopt = ctypes.CDLL("libc.so.6").mallopt
            mallopt(-4, 0)  # M_MMAP_MAX: no block gets a mapping of its own
            mallopt(-1, -1)  # M_TRIM_THRESHOLD: never return memory


def threaded(function, items):
    """map(function, items) with one thread per core, in order. Only a few results wait at a time.

    Threads suffice: Pillow and numpy release Python's lock while they compute.
    """
    threads, waiting = os.cpu_count() or 1, deque()
    with ThreadPoolExecutor(threads) as pool:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > 4 * threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


# --------------------------------------------------------------------------------------------------
# 4.2  A set of images with labels
# --------------------------------------------------------------------------------------------------


@dataclass
class ImageSet:
    """Images with labels.

    images     (N, H, W, C) uint8, C = 1 or 3: an array, a memory map, or `Files`
    labels     (N,) numbers; classes: the name of each number
    sources    (N,) what an image comes from, such as a font or a painting
    note       for the report: where the images come from, or which files were left out
    validates  (N,) bool, which images validate; None = `validation_images` decides
    """

    images: np.ndarray
    labels: np.ndarray
    sources: np.ndarray
    classes: list[str]
    note: str = ""
    validates: np.ndarray | None = None

    def batch(self, index, device="cpu"):
        """The images and labels of the rows `index`: x (B, 3, H, W) in [-1, 1] and y (B,)."""
        images = send(torch.from_numpy(self.images[index]), device)
        labels = torch.from_numpy(self.labels[index].astype(np.int64))
        return to_tensor(images), send(labels, device)

    def palettes(self):
        """The palette of every image, (N, 4, 4) float32, see `palette`. Those of a packed set are
        kept in a file beside its images."""
        packed = Path(self.images.filename) if isinstance(self.images, np.memmap) else None
        file = packed and packed.with_name("palettes.npy")
        if file and file.exists() and file.stat().st_mtime_ns > packed.stat().st_mtime_ns:
            return np.load(file)
        rows = tqdm(threaded(palette, self.images), "palettes", len(self.images), disable=None)
        found = np.stack(list(rows))
        if file and os.access(file.parent, os.W_OK):
            with whole_file(file) as temporary:
                np.save(temporary, found)
        return found

    def name(self, row):
        """A name for one image: that of its file, if it has one, else its class and its row."""
        if isinstance(self.images, Files):
            return self.images.files[row].name
        return f"{self.classes[self.labels[row]]}_{row:06d}"

    def each(self, size, function, title):
        """Yields (row, image, function(row, image)) for all images, (size, size, 3) uint8, in their
        order. Threads read them. At the end, one line names those that could not be decoded.
        UserError if none could."""

        files = isinstance(self.images, Files)
        source, read = (self.images.files, decode) if files else (self.images, fit)

        def load(row):
            try:
                image = read(source[row], size)
            except UserError as error:
                return row, None, f"{self.name(row)} ({error})"
            return row, image, function(row, image)

        rows, left_out = range(len(self.labels)), []
        for row, image, value in tqdm(
            threaded(load, rows), title, len(rows), unit="image", disable=None
        ):
            if image is None:
                left_out.append(value)
            else:
                yield row, image, value
        if left_out:
            some = ", ".join(left_out[:5]) + ", ..." * (len(left_out) > 5)
            if len(left_out) == len(rows):
                raise UserError(f"{title}: no image can be decoded: {some}")
            note = f"note: {title}: {len(left_out)} of {len(rows):,} left out: {some}"
            print(note, file=sys.stderr)

    def split(self):
        """The rows to train on and the rows to validate with."""
        validates = self.validates
        if validates is None:
            validates = validation_images(self.labels, self.sources)
        return np.flatnonzero(~validates), np.flatnonzero(validates)

    def report(self):
        """What is in the set, in a few lines."""
        counts = np.bincount(self.labels, minlength=len(self.classes))
        train, validation = self.split()
        height, width = self.images[0].shape[:2]
        lines = [
            f"{len(self.labels):,} images of {width} x {height}, {len(self.classes)} classes, "
            f"{len(train):,} for training and {len(validation):,} for validation "
            f"(from {len(np.unique(self.sources)):,} sources, each on one side only)"
        ]
        if counts.min() == counts.max():
            lines.append(f"  {counts[0]:,} per class: " + " ".join(self.classes))
        else:
            lines.append("  " + "  ".join(f"{c} {n:,}" for c, n in zip(self.classes, counts)))
        return "\n".join(lines + [f"  {self.note}"] * bool(self.note))

    def fingerprint(self):
        """A digest of classes, labels, sources and 64 of the images, wherever the set is stored."""
        digest = hashlib.sha256(json.dumps([self.classes, len(self.labels)]).encode())
        for values in (self.labels, self.sources):
            digest.update(np.asarray(values, np.int64).tobytes())
        for row in evenly(len(self.labels), 64):
            digest.update(np.ascontiguousarray(self.images[row]).tobytes())
        return digest.hexdigest()[:16]


def evenly(n, most):
    """At most `most` of the numbers 0 to n - 1, evenly spaced, the first and the last included."""
    return np.linspace(0, n - 1, min(n, most)).astype(int)


def validation_images(labels, sources, share=0.05, seed=0):
    """E68: which images validate, (N,) bool. Of every label 5 % of its sources, at least one.

    A source is on one side only. A label always keeps a source for training, so a label with a
    single source has none to validate with. The order of the sources is random but fixed.
    """
    names, source = np.unique(sources, return_inverse=True)
    has = np.zeros((len(names), labels.max() + 1), bool)  # whether a source has images of a label
    has[source, labels] = True
    order = np.random.default_rng(seed).permutation(len(names))
    held_out, left = np.zeros(len(names), bool), has.sum(0)  # left: sources per label to train on
    for label in np.argsort(np.bincount(labels), kind="stable"):  # the rarest label chooses first
        own = order[has[order, label]]
        for i in own:
            if held_out[own].sum() >= max(1, round(share * len(own))):
                break
            if not held_out[i] and (left[has[i]] > 1).all():
                held_out[i] = True
                left -= has[i]
    return held_out[source]


BUILT_IN = ("letters", "paintings")


def open_set(name, size=None, labels="folder", pack=True):
    """Open a set of images; the one reader for training and evaluation. name: one of

        letters, paintings   the project's own sets, even if there is a folder of that name;
                             "letters:train" and "letters:validation" are the sides of the split
        a folder             with one folder of images per class, or with images only (class "all")
        a packed folder      made by `data.py paintings`
        an .npz file         see `read_npz`

    size: pixels per side; None = as the images are. labels: "folder" takes the names of the
    folders; "rgb" and "lab" take the nearest colour of table 4.1 in that space (4.2.2), unless all
    folders are named after the colours. pack: whether a folder is packed beside itself first; if
    not, a file is decoded when it is indexed. Raises UserError if there is no such set.
    """
    first, _, part = str(name).partition(":")
    path = Path(name).resolve()
    if first in BUILT_IN and part in ("", "train", "validation"):
        found = embedded_letters() if first == "letters" else painted(size or 256)
        if part:
            rows = found.split()[part == "validation"]
            arrays = (found.images[rows], found.labels[rows], found.sources[rows])
            found = ImageSet(*arrays, found.classes)
    elif path.is_file():
        found = read_npz(path, size)
    elif not path.is_dir():
        raise UserError(f"{name}: no such file or folder")
    elif (path / "set.json").exists():
        found = read_packed(path)
    elif pack:
        found = pack_folder(path, packed_folder(path, size), size, labels, replace=True)
    else:
        files, passed = list_images(path)
        numbers, classes = folder_labels(path, files)
        images = Files([path / file for file in files], size)
        found = ImageSet(images, np.array(numbers), sources_of(path, files), classes, passed)
    if size and pack and found.images.shape[1] != size:
        have = found.images.shape[1]
        raise UserError(
            f"{name}: images with {have} pixels per side, not {size}; use --size {have}"
        )
    return found


def painted(size):
    """The painter's 2,000 pictures, as many per label, painted once into the cache."""
    found = paint_set(cache_folder() / f"painted.packed{size}", size, replace=True)
    found.note = "painted by the project; python plots.py sheet paintings shows them"
    return found


def embedded_letters():
    """4.2.1: 400 fonts x 26 capitals, white on black. The last 40 fonts are for validation."""
    sheet = np.asarray(Image.open(ASSETS / "letters.png").convert("L"))
    fonts = sheet.shape[0] // 32  # one per row; a letter per column
    images = sheet.reshape(fonts, 32, 26, 32).transpose(0, 2, 1, 3).reshape(-1, 32, 32, 1)
    font = np.repeat(np.arange(fonts), 26)
    validates = font >= fonts - 40
    return ImageSet(images, np.tile(np.arange(26), fonts), font, ALPHABET, validates=validates)


class Files:
    """Image files as a sequence of arrays. A file is decoded when it is indexed."""

    def __init__(self, files, size):
        self.files, self.size = files, size

    def __len__(self):
        return len(self.files)

    def __getitem__(self, i):
        try:
            return decode(self.files[i], self.size)
        except UserError as error:
            raise UserError(f"{self.files[i]}: {error}") from None


# --------------------------------------------------------------------------------------------------
# 4.2.2  Colours: the eight labels, sRGB <-> CIE-LAB, the nearest label
# --------------------------------------------------------------------------------------------------

# Table 4.1: the labels in its order, 0 to 7. It gives no RGB values: these are CSS's for the names
# (E38).
COLOURS = {
    "orange": (255, 165, 0),
    "green": (0, 128, 0),
    "blue": (0, 0, 255),
    "purple": (128, 0, 128),
    "yellow": (255, 255, 0),
    "red": (255, 0, 0),
    "black": (0, 0, 0),
    "white": (255, 255, 255),
}
TABLE_4_1 = (2586, 2493, 388, 4098, 142, 647, 3531, 5889)  # images per label, 19,774 in all (E36)
# IEC 61966-2-1: linear sRGB -> XYZ. The white point D65 is the image of (1, 1, 1).
RGB_TO_XYZ = np.array(
    [
        [0.4124564, 0.3575761, 0.1804375],
        [0.2126729, 0.7151522, 0.0721750],
        [0.0193339, 0.1191920, 0.9503041],
    ]
)
D65 = RGB_TO_XYZ.sum(1)
DELTA = 6 / 29  # below DELTA^3, CIE replaces the cube root by a straight line


def rgb_to_lab(rgb):
    """4.2.2, step 1:  sRGB -> linear -> XYZ / D65 -> CIE-LAB (E39 adds gamma and white point).

        L = 116 f(Y) - 16,   a = 500 (f(X) - f(Y)),   b = 200 (f(Y) - f(Z))
        f(t) = t^(1/3), and a straight line below (6/29)^3

    rgb: (..., 3), uint8 or float, 0 to 255. Returns (..., 3): float32 for uint8 and float32, else
    float64.
    """
    rgb = np.asarray(rgb)
    if rgb.dtype == np.uint8:
        linear = srgb_to_linear(np.arange(256, dtype=np.float32) / 255)[rgb]
    else:
        kind = np.float32 if rgb.dtype == np.float32 else np.float64
        linear = srgb_to_linear(rgb.astype(kind) / 255)
    t = linear @ (RGB_TO_XYZ / D65[:, None]).T.astype(linear.dtype)
    f = np.cbrt(np.maximum(t, DELTA**3)) + (np.minimum(t, DELTA**3) - DELTA**3) / (3 * DELTA**2)
    to_lab = np.array([[0, 116, 0], [500, -500, 0], [0, 200, -200]], f.dtype)
    return f @ to_lab.T - np.array([16, 0, 0], f.dtype)


def lab_to_rgb(lab):
    """Inverse of `rgb_to_lab`. (..., 3) -> (..., 3) float64, 0 to 255; clipped where sRGB ends."""
    lab = np.asarray(lab, np.float64) + [16, 0, 0]
    f = lab @ np.linalg.inv([[0, 116, 0], [500, -500, 0], [0, 200, -200]]).T
    t = np.where(f > DELTA, f**3, 3 * DELTA**2 * (f - DELTA) + DELTA**3)
    linear = ((t * D65) @ np.linalg.inv(RGB_TO_XYZ).T).clip(0, 1)
    return 255 * np.where(
        linear <= 0.04045 / 12.92, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055
    )


def srgb_to_linear(u):
    """IEC 61966-2-1:  u / 12.92 up to 0.04045, ((u + 0.055) / 1.055)^2.4 above; 0 to 1."""
    return np.where(u <= 0.04045, u / 12.92, ((np.maximum(u, 0) + 0.055) / 1.055) ** 2.4)


def mean_colour(images, space="rgb"):
    """4.2.2:  the mean over the pixels. In space "lab", pixels are converted first (E39).

    images: (..., H, W, 3) uint8. Returns (..., 3) float64 in that space.
    """
    values = rgb_to_lab(images) if space == "lab" else np.asarray(images)
    kind = np.uint32 if values.dtype == np.uint8 else np.float64
    columns = values.sum(-3, dtype=kind)  # two steps are faster than one mean
    return columns.mean(-2, dtype=np.float64) / values.shape[-3]


def nearest_colour(colours, space="rgb"):
    """4.2.2:  argmin_k |c - c_k|, the number of the label colour nearest to c (Euclidean distance).

    colours: (..., 3) in that space. Returns (...) int64; the first of equally near ones.
    """
    return label_distances(colours, space).argmin(-1)


def label_distances(colours, space="rgb", palette=COLOURS):
    """Distances of colours (..., 3) to every label colour: (..., K). In LAB this is Delta-E 76."""
    labels = np.array(list(palette.values()), np.float64)
    labels = rgb_to_lab(labels) if space == "lab" else labels
    return np.linalg.norm(np.asarray(colours)[..., None, :] - labels, axis=-1)


MOST_COLOURS = 4  # of a palette
ONE_COLOUR = 15.0  # nearer colours, in Delta-E, are one


def palette(image):
    """The dominant colours of an image: (4, 4) float32, rows (L, a, b, share), the largest first.

    k-means in LAB with eight centres, on a thumbnail. Then the nearest two become their mean while
    more than four are left or these two are nearer than `ONE_COLOUR`. Rows without a colour are 0.
    Not in the thesis, whose pictures have one label. image: (H, W, 1 or 3) uint8.
    """
    pixels = rgb_to_lab(fit(image, 24).astype(np.float64)).reshape(-1, 3)
    count = min(8, len(np.unique(pixels, axis=0)))
    colours, member = kmeans2(pixels, count, minit="++", rng=0)
    shares = np.bincount(member, minlength=count) / len(pixels)
    colours, shares = colours[shares > 0], shares[shares > 0]
    while len(shares) > 1:
        distance = cdist(colours, colours) + np.diag(np.full(len(shares), np.inf))
        i, j = np.unravel_index(distance.argmin(), distance.shape)
        if distance[i, j] >= ONE_COLOUR and len(shares) <= MOST_COLOURS:
            break
        colours[i] = np.average(colours[[i, j]], axis=0, weights=shares[[i, j]])
        shares[i] += shares[j]
        colours, shares = np.delete(colours, j, axis=0), np.delete(shares, j)
    order, found = np.argsort(-shares), np.zeros((MOST_COLOURS, 4), np.float32)
    found[: len(order)] = np.column_stack([colours, shares])[order]
    return found


UNKNOWN = -1.0  # the share of a colour that may have any share


def read_colours(words):
    """A palette from words such as "gold", "#1e90ff" or "#202020:0.6", a colour and its share.

    Returns (4, 4) float32 as `palette`, in the order of the words. Raises UserError.
    """
    if not 1 <= len(words) <= MOST_COLOURS:
        raise UserError(f"{len(words)} colours; expected 1 to {MOST_COLOURS}")
    found = np.zeros((MOST_COLOURS, 4), np.float32)
    for row, word in zip(found, words):
        name, has_share, share = word.partition(":")
        try:
            rgb = ImageColor.getrgb(name)[:3]
        except ValueError:
            raise UserError(
                f"{name!r} is no colour; expected a name such as gold, or #rrggbb"
            ) from None
        try:
            share = float(share) if has_share else UNKNOWN
            if has_share and not 0 < share <= 1:
                raise ValueError
        except ValueError:
            raise UserError(f"{word}: expected a share above 0 and at most 1") from None
        row[:] = *rgb_to_lab(np.array(rgb, np.float64)), share
    if found[:, 3].clip(0).sum() > 1.001:
        raise UserError("the shares of the colours are more than 1 together")
    return found


def is_plain(image):
    """4.2.2: whether an image "portrays only one plain color". At 64 x 64, in LAB, with Delta-E 76:

        the standard deviation over all three axes is below 5, or
        more than 95 % of the pixels are nearer than 6 to the median colour

    The first rule allows for noise, vignettes and canvas; the second for a small signature.
    image: (H, W, 3) uint8.
    """
    thumbnail = Image.fromarray(image).resize((64, 64), Image.Resampling.BOX)
    lab = rgb_to_lab(np.asarray(thumbnail)).reshape(-1, 3)
    near = np.linalg.norm(lab - np.median(lab, 0), axis=1) < 6
    return bool(np.sqrt(lab.var(0).sum()) < 5 or near.mean() > 0.95)


# --------------------------------------------------------------------------------------------------
# 4.2.3  Pre-processing: decode, crop, resize, [-1, 1]
# --------------------------------------------------------------------------------------------------


def decode(file, size=None):
    """An image file of any kind as an array (size, size, 3) uint8 in sRGB, its centre square.

    The rotation that a camera noted is applied, a colour profile is converted, transparent pixels
    lie on white paper, and 16-bit values are scaled. Raises UserError with the reason if the file
    is not such an image.
    """
    try:
        if not Path(file).is_file():  # a pipe would be waited for
            raise UserError("No such file, or a pipe")
        with Image.open(file) as image:
            if getattr(image, "is_animated", False) and image.format in ("GIF", "PNG", "WEBP"):
                raise UserError(f"animated: {image.n_frames} frames")
            if size:
                image.draft(None, (2 * size, 2 * size))  # large JPEGs are decoded at a reduced size
            ImageOps.exif_transpose(image, in_place=True)
            image = on_paper(to_srgb(to_8_bit(image), image.info.get("icc_profile"))).convert("RGB")
            return np.array(crop_and_resize(image, size) if size else image)
    except UserError:
        raise
    except UnidentifiedImageError:
        raise UserError("not an image") from None
    except Image.DecompressionBombError:
        raise UserError("too large: Pillow takes it for a decompression bomb") from None
    except Exception as error:  # a damaged file may raise anything
        raise UserError(getattr(error, "strerror", None) or f"damaged: {error}") from None


def to_8_bit(image):
    """A Pillow image whose 16-bit values are scaled to 8 bits."""
    if not image.mode.startswith(("I", "F")):
        return image
    deep = np.asarray(image)
    if image.mode == "F" or deep.max() > 65535:
        raise UserError("32-bit pixels: which value is white is not known")
    return Image.fromarray(np.rint(deep * (255 / 65535)).astype(np.uint8))


def to_srgb(image, profile):
    """A Pillow image, converted from its colour profile (bytes or None) to sRGB.

    A profile that is damaged, or made for another kind of pixels, is ignored.
    """
    with contextlib.suppress(ImageCms.PyCMSError, OSError):
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile or b""))
        grey, space = image.mode in ("1", "L", "LA"), source.profile.xcolor_space.strip()
        kind = {"RGB": "RGB", "GRAY": "L" if grey else None, "CMYK": "CMYK"}.get(space)
        if kind and (kind == "CMYK") == (image.mode == "CMYK"):
            clear = image.convert("RGBA").getchannel("A") if image.has_transparency_data else None
            pixels, target = image.convert(kind), ImageCms.createProfile("sRGB")
            image = ImageCms.profileToProfile(pixels, source, target, outputMode="RGB")
            if clear:
                image.putalpha(clear)
    return image


def on_paper(image):
    """A Pillow image without transparency: white shows through."""
    if not image.has_transparency_data:
        return image
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))


def crop_and_resize(image, size):
    """4.2.3:  crop the centre square, then resize it (anti-aliased). This order deforms nothing.

    A Pillow image in and out.
    """
    width, height = image.size
    side = min(width, height)
    left, top = (width - side) // 2, (height - side) // 2
    if (width, height) != (side, side):
        image = image.crop((left, top, left + side, top + side))
    return image if side == size else image.resize((size, size), Image.Resampling.LANCZOS)


def fit(image, size):
    """An array (H, W), (H, W, 1) or (H, W, 3) uint8 as (size, size, 3) uint8."""
    image = image[..., 0] if image.shape[-1] == 1 else image
    return np.array(crop_and_resize(Image.fromarray(image), size).convert("RGB"))


def to_tensor(images):
    """4.2.3:  uint8 [0, 255] -> float [-1, 1],  x = u / 127.5 - 1.

    images: (B, H, W, C) uint8 array or tensor. Returns (B, 3, H, W) float32. One grey channel
    becomes three equal ones: letters get the same form as paintings (4.2.1).
    """
    x = torch.as_tensor(images).permute(0, 3, 1, 2).float() / 127.5 - 1
    return x.expand(-1, 3, -1, -1) if x.shape[1] == 1 else x


def view(x, k):
    """One of the eight views of squares (..., n, n): mirrored if k is odd, turned k // 2 times."""
    return (x.flip(-1) if k % 2 else x).rot90(k // 2, (-2, -1))


def viewed(x, views):
    """Every image of x (B, C, n, n) in its view; views: (B,), numbers of `view`."""
    if not views.any():
        return x
    return torch.stack([view(image, k) for image, k in zip(x, views.tolist())])


def to_uint8(x):
    """Inverse of `to_tensor`: (B, 3, H, W) in [-1, 1], clamped -> (B, H, W, 3) uint8 array."""
    x = ((x.float() + 1) * 127.5).round().clamp(0, 255).byte()
    return x.permute(0, 2, 3, 1).cpu().numpy()


# --------------------------------------------------------------------------------------------------
# Packing: a folder of images -> images.npy, and set.json with everything else
# --------------------------------------------------------------------------------------------------


def pack_folder(root, folder, size, labels="folder", replace=False):
    """4.2.3: decode, crop, resize and label every image below `root`; write the set to `folder`.

    labels: see `open_set`; "rgb" and "lab" also reject plain images (4.2.2). A damaged file is left
    out, and set.json says why. Nothing is done if `folder` holds this set already. The set has
    changed if a file was added to or removed from its folders, or SOURCES.csv was edited.
    """
    files, passed = list_images(root)
    watched = sorted({file.parent for file in files}) + [Path("SOURCES.csv")]
    dates = [(root / path).stat().st_mtime_ns for path in watched if (root / path).exists()]
    state = {"size": size, "labels": labels, "files": len(files), "dates": dates}
    if is_packed(folder, state, replace):
        return read_packed(folder)
    if folder.is_relative_to(root):
        raise UserError(f"--out {folder} lies within --data {root}; name another folder")
    if labels == "folder":
        numbers, classes = folder_labels(root, files)
    else:
        numbers, classes = [colour_folder(file) for file in files], list(COLOURS)
        if None in numbers:
            numbers = [None] * len(files)

    def read(i):
        try:
            image = decode(root / files[i], size)
        except UserError as error:
            return None, str(error)
        if labels != "folder" and is_plain(image):
            return None, "plain"
        if numbers[i] is None:
            return image, int(nearest_colour(mean_colour(image, labels), labels))
        return image, numbers[i]

    names = [file.as_posix() for file in files]
    return pack(folder, state, classes, names, sources_of(root, files), read, passed)


def pack(folder, state, classes, names, sources, read, note=""):
    """Write a packed set and open it. read(i) -> the image of names[i] and its label, or None and
    the reason why it is left out."""
    rows, labels, rejected = [], [], {}
    bar = tqdm(
        threaded(read, range(len(names))), folder.name, len(names), unit="image", disable=None
    )

    def kept():
        for i, (image, label) in enumerate(bar):
            if image is None:
                rejected[names[i]] = label
                continue
            rows.append(i)
            labels.append(label)
            yield image

    with whole_file(folder) as temporary:
        temporary.mkdir()
        write_npy(temporary / "images.npy", (state["size"], state["size"], 3), np.uint8, kept())
        reasons = Counter(reason.partition(":")[0] for reason in rejected.values()).most_common()
        why = ", ".join(f"{count:,} {reason}" for reason, count in reasons)
        if not rows:
            raise UserError(
                f"{folder}: nothing to pack, all {len(names):,} files are left out: {why}"
            )
        if why:
            why = f"{len(rejected):,} of {len(names):,} files left out: {why} ({folder}/set.json)"
        note = "; ".join(filter(None, (why, note)))
        about = {"state": state, "classes": list(classes), "note": note, "rejected": rejected}
        about |= {"labels": labels, "sources": sources[rows].tolist()}
        (temporary / "set.json").write_text(json.dumps(about))
        if folder.exists():
            shutil.rmtree(folder)
    return read_packed(folder)


def write_npy(path, shape, kind, arrays):
    """Write arrays of one shape, one after the other, as one .npy file of shape (N, *shape)."""

    def header(count):  # its length does not depend on the count
        file.seek(0)
        about = {"descr": np.dtype(kind).str, "fortran_order": False, "shape": (count, *shape)}
        np.lib.format.write_array_header_1_0(file, about)

    with open(path, "wb") as file:
        header(0)
        count = sum(file.write(array.tobytes()) > 0 for array in arrays)
        header(count)


def is_packed(folder, state, replace):
    """Whether `folder` holds the set of this state. UserError if something else must not go."""
    try:
        there = json.loads((folder / "set.json").read_text())["state"]
    except (OSError, ValueError, KeyError):
        there = None
    if there == state or not folder.exists() or (there and replace) or not any(folder.iterdir()):
        return there == state
    raise UserError(f"{folder} holds something else; name another folder, or remove it first")


def read_packed(folder):
    """The packed set in `folder`; its images are a memory map."""
    try:
        about = json.loads((folder / "set.json").read_text())
        images = np.load(folder / "images.npy", mmap_mode="r")
        labels, sources = np.array(about["labels"]), np.array(about["sources"])
        if not len(images) == len(labels) == len(sources) or labels.max() >= len(about["classes"]):
            raise ValueError("its arrays do not fit together")
        return ImageSet(images, labels, sources, about["classes"], about["note"])
    except (OSError, ValueError, KeyError, EOFError) as error:
        raise UserError(
            f"{folder}: a damaged packed set ({error}); remove it, pack again"
        ) from error


def packed_folder(root, size):
    """Where a packed set goes: beside the data, or in the cache if that folder is read-only."""
    name = f"{root.name}.packed{size}"
    if os.access(root.parent, os.W_OK):
        return root.parent / name
    return cache_folder() / f"{hashlib.sha256(str(root).encode()).hexdigest()[:12]}-{name}"


def list_images(root):
    """The image files below `root` as sorted relative paths, and a note on files of other kinds.

    Hidden files, and the folders of systems and of packed sets, are passed over.
    """
    files, others, seen = [], Counter(), set()
    for path, folders, names in os.walk(root, followlinks=True):
        if (real := os.path.realpath(path)) in seen:  # a link to a folder above
            folders.clear()
            continue
        seen.add(real)
        folders[:] = [f for f in folders if f[0] != "." and ".packed" not in f]
        folders[:] = [f for f in folders if f not in SYSTEM_FOLDERS]
        for file in (Path(path, name) for name in names if name[0] != "."):
            if file.suffix.lower() in IMAGE_SUFFIXES:
                files.append(file.relative_to(root))
            elif file.name != "SOURCES.csv":
                others[file.suffix.lower() or "without a suffix"] += 1
    passed = ", ".join(f"{count:,} {kind}" for kind, count in others.most_common())
    if not files:
        found = f"; other files: {passed}" * bool(passed)
        raise UserError(f"{root}: no images in it or below it{found}")
    return sorted(files), f"files of other kinds passed over: {passed}" * bool(passed)


PARTS_OF_A_SET = {"train", "training", "val", "valid", "validation", "test", "testing"}


def folder_labels(root, files):
    """Labels by the first folder in which the paths differ: (numbers, class names).

    Colours come first, in the order of table 4.1 (E40), then other names by the alphabet.
    """
    parents = {file.parent for file in files}
    if len(parents) == 1:
        return [0] * len(files), ["all"]
    common = Path(os.path.commonpath(parents))
    if common in parents:
        raise UserError(f"{root / common}: images beside folders of images; what are the classes?")
    names = [file.relative_to(common).parts[0] for file in files]
    if {name.lower() for name in names} <= PARTS_OF_A_SET:
        some = f"{', '.join(sorted(set(names)))} are parts of a set, not classes"
        raise UserError(f"{root / common}: {some}; name one of them, such as {names[0]}")
    names = [name.lower() if name.lower() in COLOURS else name for name in names]
    order = [*COLOURS, *sorted(set(names) - set(COLOURS))]
    classes = [name for name in order if name in set(names)]
    number = {name: i for i, name in enumerate(classes)}
    return [number[name] for name in names], classes


def colour_folder(file):
    """The number of the colour after which a folder of this file is named, or None."""
    parts = [part.lower() for part in file.parts[:-1]]
    return next((number for number, name in enumerate(COLOURS) if name in parts), None)


def sources_of(root, files):
    """What every file comes from, as numbers: its `source` in SOURCES.csv, else its name.

    Files of the same name in several folders are one source: in the Kaggle set they are letters of
    one font, in WikiArt the same painting.
    """
    known, path = {}, root / "SOURCES.csv"
    if path.exists():
        with path.open(newline="", encoding="utf-8-sig", errors="surrogateescape") as table:
            try:
                known = {row["file"]: row["source"] for row in csv.DictReader(table)}
            except (KeyError, csv.Error):
                raise UserError(f"{path}: expected a table with the columns file, source") from None
    names = [known.get(f.as_posix()) or known.get(f.name) or f.stem for f in files]
    return np.unique(names, return_inverse=True)[1]


def read_npz(path, size):
    """An .npz file with uint8 `images` (N, H, W[, 1 or 3]) and perhaps `labels`, names or numbers.

    The k-th images of all classes are one source: in the Kaggle file they are of one font.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = dict(file)
        images = arrays["images"]
        labels = arrays.get("labels", np.full(len(images), "all"))
    except KeyError:
        if path.suffix != ".npz":
            raise UserError(
                f"{path}: not an .npz file; unpack it first, then name the folder"
            ) from None
        raise UserError(f"{path}: no array `images`; it holds {', '.join(arrays)}") from None
    except Exception as error:  # numpy raises whatever it meets in a file of another kind
        raise UserError(f"{path}: not an .npz file that can be read") from error
    images = images[..., None] if images.ndim == 3 else images
    fits = images.dtype == np.uint8 and images.ndim == 4 and images.shape[3] in (1, 3)
    if not fits or labels.shape != images.shape[:1] or labels.dtype.kind not in "iuU":
        found = f"images {images.dtype} {images.shape} and labels {labels.dtype} {labels.shape}"
        raise UserError(
            f"{path}: expected uint8 images (N, H, W[, 1 or 3]) and N labels, found {found}"
        )
    if size and images.shape[1:3] != (size, size):
        images = np.stack(list(threaded(lambda image: fit(image, size), images)))
    values, numbers = np.unique(labels, return_inverse=True)
    order = np.argsort(numbers, kind="stable")
    sources = np.empty(len(numbers), np.int64)
    sources[order] = np.arange(len(numbers)) - np.searchsorted(numbers[order], numbers[order])
    return ImageSet(images, numbers, sources, [str(value) for value in values])


# --------------------------------------------------------------------------------------------------
# Painted pictures, for those who have no paintings at hand
# --------------------------------------------------------------------------------------------------


def paint(seed, label, size=256):
    """An abstract picture whose mean colour is nearest to that of `label`, in RGB and in LAB.

    A function of its arguments. Returns (size, size, 3) uint8.
    """

    def fits(picture):
        rules = (nearest_colour(mean_colour(picture, space), space) for space in ("rgb", "lab"))
        return all(number == label for number in rules)

    rng, colour = np.random.default_rng([seed, label]), list(COLOURS.values())[label]
    pigments = list(painter.PIGMENTS.values())
    return painter.paint(rng, size, [colour], rgb_to_lab, fits, pigments)


def paint_any(seed, size=256):
    """An abstract picture of one, two or three colours of any kind, for palettes.

    They and the accents are uniform in the RGB cube. Returns (size, size, 3) uint8.
    """
    rng = np.random.default_rng([seed, len(COLOURS)])
    count = rng.integers(1, 4)
    colours, pigments = np.split(rng.uniform(0, 255, (count + len(painter.PIGMENTS), 3)), [count])

    def fits(picture):  # the mean of several colours is none of them
        distance = np.linalg.norm(mean_colour(picture, "lab") - rgb_to_lab(colours[0]))
        return count > 1 or distance < ONE_COLOUR

    return painter.paint(rng, size, colours, rgb_to_lab, fits, pigments)


def paint_set(folder, size=256, count=2000, seed=0, shares="balanced", replace=False):
    """Paint a packed set. shares: "balanced", "table" for the shares of table 4.1, or
    "palettes": balanced, but every second picture is by `paint_any` and has the nearest label."""
    state = {"painter": painter.VERSION, "size": size, "n": count, "seed": seed, "shares": shares}
    if is_packed(folder, state, replace):
        return read_packed(folder)
    weights = np.array(TABLE_4_1 if shares == "table" else [1] * len(COLOURS))
    ends = np.rint(np.cumsum(weights) / weights.sum() * count)
    labels = np.searchsorted(ends, np.arange(count), side="right")
    labels = np.random.default_rng(seed).permutation(labels).tolist()

    def read(i):
        if shares == "palettes" and i % 2:
            picture = paint_any(seed * 2**32 + i, size)
            return picture, int(nearest_colour(mean_colour(picture)))
        return paint(seed * 2**32 + i, labels[i], size), labels[i]

    names = [f"picture {i}" for i in range(count)]
    return pack(folder, state, COLOURS, names, np.arange(count), read)


# --------------------------------------------------------------------------------------------------
# Which rows an update sees: functions of (seed, n), the same in every process
# --------------------------------------------------------------------------------------------------


ROWS, LOSS, VALIDATION, CODES, PREVIEW, SHUFFLE, BALANCED = range(1, 8)  # what `rng` is for


def rng(*key):
    """A random generator (CPU) that is a function of `key`, whole numbers."""
    seed = np.random.SeedSequence(key).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(seed))


@lru_cache(maxsize=64)
def permutation(n, *key):
    return torch.randperm(n, generator=rng(*key)).numpy()


def endless(position, size, seed, *key):
    """The entries at `position` of an endless chain of permutations of `size` rows."""
    epoch, place = np.divmod(position, size)
    rows = np.empty(len(position), np.int64)
    for e in np.unique(epoch):
        rows[epoch == e] = permutation(size, seed, int(e), *key)[place[epoch == e]]
    return rows


def rows_of_update(seed, n, batch, size):
    """Which of `size` images update n (from 0) sees: the next `batch` of an endless chain of
    permutations, one per epoch."""
    return endless(np.arange(n * batch, (n + 1) * batch), size, seed, ROWS)


def balanced_rows_of_update(seed, n, batch, labels):
    """4.2.2, against the unbalanced classes: like `rows_of_update`, but every label is seen equally
    often.

    Labels take turns. Each goes through permutations of its own images, so no image returns before
    all images of its label were seen. The batch is then shuffled: otherwise a process that takes
    every second row would always see the same labels. labels: (N,), of the images to draw from.
    """
    present = np.unique(labels)
    turn, label = np.divmod(np.arange(n * batch, (n + 1) * batch), len(present))
    rows = np.empty(batch, np.int64)
    for k, value in enumerate(present):
        members = np.flatnonzero(labels == value)
        rows[label == k] = members[endless(turn[label == k], len(members), seed, BALANCED, k)]
    return rows[torch.randperm(batch, generator=rng(seed, n, SHUFFLE)).numpy()]


# --------------------------------------------------------------------------------------------------
# Command line
# --------------------------------------------------------------------------------------------------


def parse():
    parser = argparse.ArgumentParser(description="Sets of letters (4.2.1) and paintings (4.2.2).")
    commands = parser.add_subparsers(dest="command", required=True)
    p = commands.add_parser("letters", help="pack and report a set, or make one from fonts")
    p.add_argument(
        "--data", default="letters", help="one folder per class, or .npz (default letters)"
    )
    p.add_argument("--fonts", help="render A to Z of the fonts in this folder instead, to --out")
    p.add_argument("--out", help="new folder for the rendered letters, one folder per letter")
    p = commands.add_parser("paintings", help="pack a folder of images by colour, or paint a set")
    p.add_argument("--data", help="folder of images, nested or flat (default: paint a set instead)")
    p.add_argument("--out", help="folder for the packed set (default: beside --data, or the cache)")
    p.add_argument("--size", type=int, default=256, help="pixels per side (default 256)")
    p.add_argument(
        "--space", choices=("rgb", "lab"), default="rgb", help="of the nearest colour (rgb)"
    )
    p.add_argument("--count", type=int, default=2000, help="pictures to paint (default 2000)")
    p.add_argument(
        "--shares",
        choices=("balanced", "table", "palettes"),
        default="balanced",
        help="of the labels; palettes: every second picture has one to three colours of any kind",
    )
    p.add_argument("--seed", type=int, default=0, help="of the painted pictures (default 0)")
    return parser.parse_args()


def letters_command(args):
    if not args.fonts:
        print(open_set(args.data, 32).report())
        return
    if not args.out or Path(args.out).exists():
        raise UserError("--fonts renders to a new folder: name one that does not exist with --out")
    try:
        with whole_file(args.out) as temporary:
            reasons = painter.letters_from_fonts(Path(args.fonts), temporary)
    except ValueError as error:
        raise UserError(str(error)) from None
    print(f"{args.out}: 26 letters of {reasons.pop(''):,} fonts; left out (see fonts.csv):")
    for reason, count in reasons.most_common():
        print(f"  {count:,} {reason}")


def paintings_command(args):
    if args.size < 8 or args.count < 1 or args.seed < 0:
        raise UserError("--size must be 8 or more, --count 1 or more, --seed 0 or more")
    if args.data and not Path(args.data).is_dir():
        raise UserError(f"{args.data}: no such folder")
    root = Path(args.data or cache_folder() / "painted").resolve()
    out = Path(args.out).resolve() if args.out else packed_folder(root, args.size)
    if args.data:
        found = pack_folder(root, out, args.size, args.space, replace=not args.out)
    else:
        found = paint_set(out, args.size, args.count, args.seed, args.shares, not args.out)
    print(f"{out}: {found.report()}")


def main():
    args = parse()
    {"letters": letters_command, "paintings": paintings_command}[args.command](args)


if __name__ == "__main__":
    run_program(main)
