"""Images in, pictures out: section 4.2 of the thesis, and what all programs share: errors, devices, charts.

    python data.py letters --data PATH                  pack a set of letters (any folder-per-class tree) and report it
    python data.py letters --fonts DIR --out DIR        make such a set from fonts; --sheet FILE shows one (fig. 4.1)
    python data.py paintings --data DIR --out DIR       pack any folder of images with colour labels; without --data, paint one
    python data.py relabel --data DIR                   compare the thesis's two labelling rules (figs 4.2 and 4.3)
    python data.py rows LDM=DIR StyleGAN=DIR            chosen images of several models, a row each (fig. 5.8)

A set of images is packed once into a uint8 memory map; training then reads batches straight from it. The embedded letters
(`assets/letters.png`: 400 fonts x 26 capitals) need no packing, and neither they nor the embedded painter a download.
"""

import argparse
import contextlib
import csv
import ctypes
import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import time
import warnings
import zipfile
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageColor, ImageDraw, ImageFont, ImageOps, UnidentifiedImageError
from tqdm import tqdm

try:
    import fcntl
except ImportError:  # Windows: no locks between processes
    fcntl = None

ASSETS = Path(__file__).parent / "assets"
ALPHABET = [chr(ord("A") + i) for i in range(26)]
IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff"}

# ------------------------------------------------------------------------------------------------------------------
# Files and errors, for every program of the project
# ------------------------------------------------------------------------------------------------------------------


class UserError(Exception):
    """Something the user gave cannot work. The message is one line: what is wrong and what to do."""


def run_program(main):
    """Run a command-line program: a UserError becomes one line on stderr and exit code 2."""
    try:
        main()
        return
    except BrokenPipeError:
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
    except UserError as error:
        message = str(error)
    except OSError as error:  # a full disk, above all
        message = f"{error.filename or 'a file'}: {error.strerror or error}"
    except RuntimeError as error:  # torch's, of a GPU or of a CPU
        if not any(words in str(error) for words in ("out of memory", "can't allocate memory")):
            raise
        message = "not enough memory: a smaller --batch needs less, and --accumulate of train.py makes up for it"
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


@contextlib.contextmanager
def whole_file(path):
    """Write `path` whole or not at all: yields a temporary path beside it, renamed to `path` if the block succeeds.

    Raises UserError when the disk is full or the folder cannot be written; the old `path` is then untouched.
    """
    path = Path(path)
    temporary = path.with_name(f".{os.getpid()}-{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        if temporary.is_file():
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        _remove(temporary)
        raise UserError(f"cannot write {path}: {error.strerror or error}; nothing was changed") from error
    except BaseException:
        _remove(temporary)
        raise


def picture_name(path):
    """`path`, if it is the name of a file that Pillow can write."""
    if Image.registered_extensions().get(Path(path).suffix.lower()) not in set(Image.SAVE) - {"HDF5", "GRIB", "BUFR", "WMF"}:
        raise UserError(f"{path}: not the name of a picture; end it with .png")
    return path


def _remove(path):
    if path.is_dir():
        shutil.rmtree(path)
    elif path.exists():
        path.unlink()


# ------------------------------------------------------------------------------------------------------------------
# Devices, for every program of the project
# ------------------------------------------------------------------------------------------------------------------


def best_device():
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def tune(device, keep_memory=True):
    """Before the first network on a CPU: two defaults that cost the large model half its speed. Elsewhere it does nothing.

    Matrix products go through oneDNN, as convolutions do: MKL, torch's default, has half the speed on AMD's processors. The
    switch for it permits bfloat16, of which only processors with AMX make use; there it is put back, float32 stays float32.
    glibc gives large blocks back to the system and gets them again, page by page, at every layer; with `keep_memory` it keeps
    them. (Not under FSDP, which gathers blocks of many sizes for a moment: what is kept would be a third more memory.)
    """
    if torch.device(device).type != "cpu":
        return
    matmul, x = torch.backends.mkldnn.matmul, torch.linspace(-1, 2, 256 * 256, dtype=torch.float64).view(256, 256)
    matmul.fp32_precision = "bf16"
    if not torch.allclose((x.float() @ x.float()).double(), x @ x, rtol=1e-5, atol=1e-3):
        matmul.fp32_precision = "ieee"
    if not keep_memory:
        return
    with contextlib.suppress(OSError, AttributeError):  # another C library than glibc
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        mallopt(-4, 0)  # M_MMAP_MAX: no block of its own mapping
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: never


def check_device(device):
    """The device, if it is there."""
    try:
        kind = torch.zeros(1, device=device).device.type
    except (RuntimeError, AssertionError):
        kind = None
    if kind not in ("cuda", "mps", "cpu"):
        raise UserError(f"--device {device}: not there on this machine")
    return device


# ------------------------------------------------------------------------------------------------------------------
# 4.2  Sets of images with labels
# ------------------------------------------------------------------------------------------------------------------


@dataclass
class ImageSet:
    """images (N, H, W, C) uint8, C = 1 or 3, often a memory map; labels (N,); sources (N,): what an image comes from, a font
    or a painting; classes: the names of the labels."""

    images: np.ndarray
    labels: np.ndarray
    sources: np.ndarray
    classes: list[str]
    note: str = ""  # where the images come from, or which files were left out, for the report

    def batch(self, index, device="cpu"):
        """Images and labels of the rows `index`, an integer array: x (B, 3, H, W) in [-1, 1], y (B,), on `device`."""
        images = torch.from_numpy(self.images[index]).to(device, non_blocking=True)
        labels = torch.from_numpy(self.labels[index].astype(np.int64)).to(device, non_blocking=True)
        return to_tensor(images), labels

    def split(self, validation=40):
        """Rows for training and for validation, by source and never by image: the last sources validate.

        `validation`: how many sources, at most a tenth of all and at least one.
        """
        sources, counts = np.unique(self.sources, return_counts=True)
        complete = sources[counts == counts.max()]  # those with an image of every class, where there are such
        held_out = complete[-max(1, min(validation, len(sources) // 10)) :]
        validates = np.isin(self.sources, held_out)
        return np.flatnonzero(~validates), np.flatnonzero(validates)

    def report(self):
        """What is in the set, in a few lines: counts per class among them."""
        counts = np.bincount(self.labels, minlength=len(self.classes))
        train, validate = self.split()
        size = f"{self.images.shape[1]} x {self.images.shape[2]}"
        lines = [f"{len(self.images):,} images of {size}, {len(self.classes)} classes, {len(train):,} to train on and"]
        lines[0] += f" {len(validate):,} to validate (split by source: {len(np.unique(self.sources)):,} sources)"
        if counts.min() == counts.max():
            lines.append(f"  {counts[0]:,} a class: " + " ".join(self.classes))
        else:
            lines.append("  " + "  ".join(f"{name} {count:,}" for name, count in zip(self.classes, counts)))
        return "\n".join(lines + [f"  {self.note}"] * bool(self.note))


class Paintings(ImageSet):
    """A set of images whose labels are the colours of table 4.1."""

    def split(self, share=0.05, seed=0):
        """E68: rows for training and for validation, seeded: `share` of every label, at least one image of it, whole sources.

        The rarest label is served first. Where sources are many images each, a label may give up to twice its share, and
        always keeps most of its images to train on; a label of a single source then has nothing to validate with. Where all
        sources are too large for that, the smallest validates whose labels have others.
        """
        sources, source = np.unique(self.sources, return_inverse=True)
        counts = np.zeros((len(sources), len(self.classes)), np.int64)  # images of every source and label
        np.add.at(counts, (source, self.labels), 1)
        order = np.random.default_rng(seed).permutation(len(sources))
        total = counts.sum(0)
        wanted = np.where(total > 1, np.maximum(1, np.rint(share * total)), 0)
        most = np.minimum(np.maximum(1, 2 * wanted), total // 2)
        held_out, held = np.zeros(len(sources), bool), np.zeros_like(total)
        for label in np.argsort(total, kind="stable"):
            for i in order[counts[order, label] > 0]:
                if held[label] >= wanted[label]:
                    break
                if not held_out[i] and (held + counts[i] <= most).all():
                    held_out[i] = True
                    held += counts[i]
        others = ((counts < total) | (counts == 0)).all(1)  # sources that are no label's only one
        if not held_out.any() and others.any():
            held_out[np.where(others, counts.sum(1), counts.sum() + 1).argmin()] = True
        return np.flatnonzero(~held_out[source]), np.flatnonzero(held_out[source])


def open_letters(path=None):
    """The training set of the letters stage (4.2.1), 32 x 32.

    path: None for the embedded letters; else a folder with one folder of images a class (the Kaggle set's `Images/Images`,
    or any tree), or an .npz with `images` and `labels` (its `character_font.npz`). Packed on first use.
    Raises UserError for a path that holds no such set.
    """
    return open_packed(path, size=32) if path else embedded_letters()


def embedded_letters():
    """400 fonts x 26 capitals, white on black, 16 grey levels; `assets/letters_fonts.csv` names the fonts."""
    sheet = np.asarray(Image.open(ASSETS / "letters.png").convert("L"))  # one row a font, one column a letter
    fonts = sheet.shape[0] // 32
    images = sheet.reshape(fonts, 32, 26, 32).transpose(0, 2, 1, 3).reshape(-1, 32, 32, 1)
    return ImageSet(images, np.tile(np.arange(26), fonts), np.repeat(np.arange(fonts), 26), ALPHABET)


def open_paintings(path=None, size=256):
    """The training set of the first stage and of the latent model (4.2.2), size x size, labels in the order of table 4.1.

    path: None for pictures of the embedded painter, painted once and kept in the user's cache; or a folder of images, nested
    or flat: labels are those of its folders if these are named after the colours, else the nearest colours in RGB. A
    `SOURCES.csv` in it (columns file, source) says which images must not be parted by the split; without one, images of the
    same file name are one source, unless that is a number. Packed on first use, see `pack_paintings`; or a folder that
    `python data.py paintings` has packed. Raises UserError for a path that holds no such set.
    """
    if path is None:
        painted = paint_set(Path.home() / ".cache" / "color-diffusion" / f"painted.packed{size}", size, replace=True)
        painted.note = "painted by data.py, as there is no --data; see it with python data.py paintings --sheet sheet.png"
        return painted
    root = Path(path).resolve()
    if not root.is_dir():
        raise UserError(f"{path}: no such folder; expected a folder of images, or one that python data.py paintings has packed")
    if (root / "set.json").exists():
        return read_packed(root, size)
    return pack_paintings(root, packed_folder(root, size), size, replace=True)


# ------------------------------------------------------------------------------------------------------------------
# 4.2.1  Letters from fonts, in the layout of the Kaggle set
# ------------------------------------------------------------------------------------------------------------------

FONT_SUFFIXES = {".ttf", ".otf", ".ttc", ".otc", ".pfb"}


def letters_from_fonts(fonts, out):
    """Render A to Z of every font below `fonts` to `out`/A/<n>.png and so on; `out`/fonts.csv says which font is n.

    White on black, 32 x 32, longer side 30 pixels, centred. Returns a Counter: reason -> fonts rejected for it, "" = kept.
    """
    fonts, out = Path(fonts), Path(out)
    files = sorted(file for file in fonts.rglob("*") if file.suffix.lower() in FONT_SUFFIXES)
    if not files:
        raise UserError(f"{fonts}: no fonts in it or below it (expected {', '.join(sorted(FONT_SUFFIXES))})")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} is not an empty folder; name another with --out")
    first, reasons = {}, Counter()
    with whole_file(out) as temporary:
        for letter in ALPHABET:
            (temporary / letter).mkdir(parents=True)
        with (temporary / "fonts.csv").open("w", newline="", encoding="utf-8", errors="surrogateescape") as csv_file:
            table = csv.writer(csv_file)
            table.writerow(("n", "file", "rejected"))
            for file in tqdm(files, "rendering", unit="font", disable=None):
                n = reasons[""]
                try:
                    letters = render_letters(file)
                    same = first.setdefault(letters.tobytes(), file)
                    if same != file:
                        raise UserError(f"the same letters as another font: {same.relative_to(fonts)}")
                except UserError as error:
                    reasons[str(error).partition(":")[0]] += 1
                    table.writerow(("", file.relative_to(fonts), error))
                    continue
                for letter, image in zip(ALPHABET, letters):
                    Image.fromarray(image).save(temporary / letter / f"{n}.png")
                table.writerow((n, file.relative_to(fonts), ""))
                reasons[""] += 1
        if not reasons[""]:
            raise UserError(f"{fonts}: none of {len(files)} fonts has 26 letters: {dict(reasons)}")
    return reasons


def render_letters(file):
    """The capitals of a font as (26, 32, 32) uint8. UserError: why they are no letters."""
    try:
        face = ImageFont.truetype(str(file), 96)
        glyphs = [glyph(face, char) for char in [*ALPHABET, "\U0010fffe"]]  # the last is in no font: it shows .notdef
    except (OSError, ValueError) as error:
        raise UserError(f"not a font that can be drawn: {error}") from None
    *glyphs, notdef = glyphs
    if None in glyphs:
        raise UserError(f"blank letters: {', '.join(char for char, g in zip(ALPHABET, glyphs) if g is None)}")
    missing = [
        char for char, g in zip(ALPHABET, glyphs) if notdef and g.size == notdef.size and g.tobytes() == notdef.tobytes()
    ]
    if missing:
        raise UserError(f"missing letters, drawn as .notdef: {', '.join(missing)}")
    letters = np.zeros((26, 32, 32), np.uint8)
    for letter, g in zip(letters, glyphs):
        scale = 30 / max(g.size)
        width, height = (max(1, round(side * scale)) for side in g.size)
        left, top = (32 - width) // 2, (32 - height) // 2
        letter[top : top + height, left : left + width] = g.resize((width, height), Image.Resampling.LANCZOS)
    known = {}
    for char, letter in zip(ALPHABET, letters):
        other = known.setdefault(letter.tobytes(), char)
        if other != char:
            raise UserError(f"identical letters: {other} and {char}")
    return letters


def glyph(face, char):
    """A character as a grey Pillow image without margins, None if blank."""
    left, top, right, bottom = face.getbbox(char)
    if right <= left or bottom <= top:
        return None
    image = Image.new("L", (right - left, bottom - top))
    ImageDraw.Draw(image).text((-left, -top), char, 255, face)
    return image.crop(image.getbbox()) if image.getbbox() else None


# ------------------------------------------------------------------------------------------------------------------
# 4.2.2  Colours: the eight labels, sRGB <-> CIE-LAB, the nearest label
# ------------------------------------------------------------------------------------------------------------------

# Table 4.1: the labels in its order, 0 to 7. It gives no RGB values: these are CSS's for the names (E38).
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
TABLE_4_1 = (2586, 2493, 388, 4098, 142, 647, 3531, 5889)  # the thesis's images of every label, 19,774 in all (E36)
# IEC 61966-2-1: linear sRGB -> XYZ for the white point D65, which is the image of (1, 1, 1)
RGB_TO_XYZ = np.array([[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]])
D65 = RGB_TO_XYZ.sum(1)
DELTA = 6 / 29  # where CIE's cube root gives way to a straight line


def rgb_to_lab(rgb):
    """4.2.2, step 1:  sRGB -> linear -> XYZ / D65 -> CIE-LAB (E39 fills in gamma and white point).

        L = 116 f(Y) - 16,   a = 500 (f(X) - f(Y)),   b = 200 (f(Y) - f(Z)),   f(t) = t^(1/3), a straight line below (6/29)^3

    rgb: (..., 3), uint8 or float, 0 to 255. Returns (..., 3): float32 for uint8 and float32, else float64.
    """
    rgb = np.asarray(rgb)
    if rgb.dtype == np.uint8:
        linear = srgb_to_linear(np.arange(256, dtype=np.float32) / 255)[rgb]
    else:
        linear = srgb_to_linear(rgb.astype(np.float32 if rgb.dtype == np.float32 else np.float64) / 255)
    t = linear @ (RGB_TO_XYZ / D65[:, None]).T.astype(linear.dtype)
    f = np.cbrt(np.maximum(t, DELTA**3)) + (np.minimum(t, DELTA**3) - DELTA**3) / (3 * DELTA**2)
    return f @ np.array([[0, 116, 0], [500, -500, 0], [0, 200, -200]], f.dtype).T - np.array([16, 0, 0], f.dtype)


def lab_to_rgb(lab):
    """Inverse of `rgb_to_lab`, clipped to what a screen shows: (..., 3) -> (..., 3) float, 0 to 255."""
    lab = np.asarray(lab) * 1.0
    f = (lab[..., :1] + 16) / 116 + lab[..., 1:2] * (0.002, 0, 0) - lab[..., 2:] * (0, 0, 0.005)
    t = np.maximum(f, DELTA) ** 3 + (np.minimum(f, DELTA) - DELTA) * 3 * DELTA**2
    linear = (t * D65) @ np.linalg.inv(RGB_TO_XYZ).T
    return 255 * linear_to_srgb(np.clip(linear, 0, 1))


def srgb_to_linear(u):
    """IEC 61966-2-1:  u / 12.92 up to 0.04045, ((u + 0.055) / 1.055)^2.4 above; 0 to 1."""
    return np.where(u <= 0.04045, u / 12.92, ((np.maximum(u, 0) + 0.055) / 1.055) ** 2.4)


def linear_to_srgb(v):
    return np.where(v <= 0.0031308, 12.92 * v, 1.055 * np.maximum(v, 0.0031308) ** (1 / 2.4) - 0.055)


def mean_colour(images, space="rgb"):
    """4.2.2:  the mean over the pixels; in space "lab" pixels are converted first and then averaged, as printed (E39).

    images: (..., H, W, 3) uint8. Returns (..., 3) float64 in that space.
    """
    values = rgb_to_lab(images) if space == "lab" else np.asarray(images)
    columns = values.sum(-3, dtype=np.uint32 if values.dtype == np.uint8 else np.float64)  # faster than a mean at once
    return columns.mean(-2, dtype=np.float64) / values.shape[-3]


def nearest_colour(colours, space="rgb", palette=COLOURS):
    """4.2.2:  argmin_k |c - c_k|, the number of the label colour nearest to c, by Euclidean distance in the given space.

    colours: (..., 3) in that space, such as `mean_colour` returns. Returns (...) int64; the first of equally near ones.
    """
    return label_distances(colours, space, palette).argmin(-1)


def label_distances(colours, space="rgb", palette=COLOURS):
    """Distances of colours (..., 3) to every label colour: (..., K). In LAB this is Delta-E 76."""
    labels = np.array(list(palette.values()), np.float64)
    labels = rgb_to_lab(labels) if space == "lab" else labels
    return np.linalg.norm(np.asarray(colours)[..., None, :] - labels, axis=-1)


# ------------------------------------------------------------------------------------------------------------------
# 4.2.2  Paintings: any folder of images -> a packed set with colour labels
# ------------------------------------------------------------------------------------------------------------------

MOST_PIXELS = 2 * Image.MAX_IMAGE_PIXELS  # 179 million: above, Pillow takes a file for a decompression bomb, and so do we


def pack_paintings(root, folder, size, space="rgb", palette=COLOURS, processes=None, replace=False):
    """4.2.2, 4.2.3: decode, crop, resize, reject and label every image below `root`; write the packed set to `folder`, once.

    files.csv in `folder` has every file's label, or why it was rejected. One bad file stops nothing; an interrupted call goes
    on when it is repeated. The set counts as changed when a file is added to or removed from its folders, or SOURCES.csv is
    edited. processes: None = one a core. Returns the set; raises UserError where there is nothing to pack.
    """
    if folder.is_relative_to(root):
        raise UserError(f"--out {folder} lies within --data {root}, which is left as it is; name a folder outside of it")
    tree = [(path, names) for path, _, names in walk(root)]
    dates = [path for path, _ in tree] + [root / "SOURCES.csv"] * (root / "SOURCES.csv").exists()
    dates = sorted([str(path.relative_to(root)), path.stat().st_mtime_ns] for path in dates)
    state = {"size": size, "space": space, "palette": {name: list(rgb) for name, rgb in palette.items()}, "files": dates}

    def pack_tree(folder, state):
        files = sorted((path / name).relative_to(root) for path, names in tree for name in names)
        if not files:
            raise UserError(f"{root}: no images in it or below it (expected {', '.join(sorted(IMAGE_SUFFIXES))})")
        tasks = [(root / file, label) for file, label in zip(files, folder_labels(root, files, palette))]
        read = partial(read_painting, size=size, space=space, palette=palette)

        def results(start):
            return in_processes(read, tasks[start:], 256, processes)

        pack(folder, state, list(palette), (size, size, 3), files, source_names(root, files), results)

    pack_once(folder, state, pack_tree, replace)
    return read_packed(folder, size)


def walk(root):
    """os.walk below `root` as (folder, folder names, names of images), past hidden and packed folders, through links.

    A folder that links lead to twice, such as one that holds itself, counts once.
    """
    seen = set()
    for path, folders, files in os.walk(root, followlinks=True):
        if (real := os.path.realpath(path)) in seen:
            folders.clear()
            continue
        seen.add(real)
        inside = {folder.name for folder in subfolders(Path(path))}
        folders[:] = [name for name in folders if name in inside]
        yield Path(path), folders, [name for name in files if is_image(Path(name))]


def folder_labels(root, files, palette):
    """The labels of a labelled tree: numbers in the order of the palette, whatever the alphabet says (E40); else all None."""
    numbers = {name.lower(): number for number, name in enumerate(palette)}
    labels = [next((numbers[part.lower()] for part in file.parts[:-1] if part.lower() in numbers), None) for file in files]
    if None in labels and len(set(labels)) > 2:
        odd = files[labels.index(None)]
        raise UserError(
            f"{root}: folders are named after colours, but {odd} is in none of them; move it, or rename the folders"
        )
    return [None] * len(files) if None in labels else labels


def source_names(root, files):
    """What every file comes from: its `source` in SOURCES.csv, looked up by path or name; without a row, its own name.

    So a painting that is in two folders under the same name, as WikiArt has them, is one source. A mere number is no name: the
    1.jpg of every folder is another picture.
    """
    known, path = {}, root / "SOURCES.csv"
    if path.exists():
        try:
            with path.open(newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
                table = csv.DictReader(file)
                if not {"file", "source"} <= set(table.fieldnames or ()):
                    found = ", ".join(table.fieldnames or ()) or "nothing"
                    raise UserError(f"{path}: expected the columns file and source, found {found}")
                known = {row["file"]: row["source"] for row in table if row["source"]}
        except csv.Error as error:
            raise UserError(f"{path}: not a table that can be read ({error})") from error
    own = [str(file) if file.stem.isdecimal() else file.stem for file in files]
    return [known.get(file.as_posix(), known.get(file.name, name)) for file, name in zip(files, own)]


def read_painting(task, size, space="rgb", palette=COLOURS):
    """One file as a uint8 array (size, size, 3) with its label, or (None, why it is rejected). task: (file, label or None)."""
    file, label = task
    try:
        image = decode(file, size)
    except UserError as error:
        return None, str(error)
    except Exception as error:  # damaged files raise whatever the decoder stumbles on; none may stop the job
        return None, f"damaged: {error}"
    if is_plain(image):
        return None, "plain"
    image = np.asarray(image)
    return image, int(nearest_colour(mean_colour(image, space), space, palette)) if label is None else label


def decode(file, size):
    """The centre of an image file of any kind as an 8-bit RGB Pillow image, size x size. UserError: why it is rejected.

    Cameras' rotation is applied, transparent pixels lie on white paper, 16-bit values are scaled. JPEGs far larger than
    needed are decoded at an eighth to a half of their size.
    """
    if not file.is_file():  # opening a pipe would wait for ever
        raise UserError("not a file: a pipe, a device or a link to nowhere")
    with warnings.catch_warnings(), contextlib.ExitStack() as stack:
        warnings.simplefilter("ignore")  # large but not too large, odd metadata
        try:
            image = stack.enter_context(Image.open(file))
        except Image.DecompressionBombError:
            raise UserError(f"too large: more than {MOST_PIXELS:,} pixels") from None
        except UnidentifiedImageError:
            raise UserError("empty file" if file.stat().st_size == 0 else "not an image") from None
        if getattr(image, "is_animated", False) and image.format in ("GIF", "PNG", "WEBP"):
            raise UserError(f"animated: {image.n_frames} frames")
        image.draft(None, (2 * size, 2 * size))
        return crop_and_resize(on_paper(upright_8_bit(image)).convert("RGB"), size)


def is_plain(image):
    """4.2.2: images that "portray only one plain color". At 64 x 64, in LAB, with Delta-E 76:

        standard deviation over all three axes < 5,   or   Delta-E to the median colour < 6 for more than 95 % of the pixels

    Survives noise, vignettes, the texture of a canvas (first half) and a small signature (second half).
    """
    lab = rgb_to_lab(np.asarray(image.resize((64, 64), Image.Resampling.BOX))).reshape(-1, 3)
    deviation = np.sqrt(lab.var(0).sum())
    return bool(deviation < 5 or (np.linalg.norm(lab - np.median(lab, 0), axis=1) < 6).mean() > 0.95)


# ------------------------------------------------------------------------------------------------------------------
# 4.2  Figures 4.1 to 4.4: what is in a set, and what the two rules make of it
# ------------------------------------------------------------------------------------------------------------------


def relabel(paintings, palette=COLOURS):
    """4.2.2, the re-clustering: labels of every image by the RGB and by the LAB rule, and how wrong the RGB one is in LAB.

    Returns (rgb, lab, excess), (N,) each; excess: how much farther in Delta-E the RGB label is than the LAB label.
    """
    means = {"rgb": [], "lab": []}
    for i in tqdm(range(0, len(paintings.images), 32), "mean colours", unit="batch", disable=None):
        for space, found in means.items():
            found.append(mean_colour(paintings.images[i : i + 32], space))
    rgb, lab = (nearest_colour(np.concatenate(means[space]), space, palette) for space in means)
    distances = label_distances(np.concatenate(means["lab"]), "lab", palette)
    rows = np.arange(len(rgb))
    return rgb, lab, distances[rows, rgb] - distances[rows, lab]


def transition_report(rgb, lab, names):
    """Both histograms, and how many images went from which RGB label (row) to which LAB label (column)."""
    table = np.zeros((len(names), len(names)), int)
    np.add.at(table, (rgb, lab), 1)
    width = max(map(len, names)) + 2
    lines = [f"{'':{width}}{'RGB':>14}{'LAB':>16}"]
    for name, a, b in zip(names, table.sum(1), table.sum(0)):
        lines.append(f"{name:{width}}{a:7,} {100 * a / len(rgb):5.1f} %{b:8,} {100 * b / len(rgb):5.1f} %")
    lines += [
        f"the LAB rule changes {100 * (rgb != lab).mean():.1f} % of {len(rgb):,} labels; from RGB (row) to LAB (column):",
        "",
    ]
    lines.append(" " * width + "".join(f"{name:>{width}}" for name in names))
    lines += [f"{name:{width}}" + "".join(f"{count:>{width},}" for count in row) for name, row in zip(names, table)]
    return "\n".join(lines)


def worst_mismatches(paintings, rgb, lab, excess, rows=8, columns=8):
    """Figure 4.2: for the most frequent changes of label, a row each, the images whose RGB label fits worst. The picture."""
    moves = Counter(zip(rgb[rgb != lab].tolist(), lab[rgb != lab].tolist())).most_common(rows)
    images, names = [], []
    for (a, b), _ in moves:
        which = np.flatnonzero((rgb == a) & (lab == b))
        which = which[np.argsort(-excess[which], kind="stable")][:columns]
        row = np.full((columns, *paintings.images.shape[1:]), 255, np.uint8)
        row[: len(which)] = paintings.images[which]
        images.append(row)
        names.append(f"{paintings.classes[a]} > {paintings.classes[b]}")
    return grid(thumbnails(np.concatenate(images)), columns, names)


def contact_sheet(data, each=8, columns=8, side=96):
    """Figures 4.1 and 4.4: `each` images of every label, evenly picked, in rows of `columns`. Returns the picture."""
    images, names = [], []
    for label, name in enumerate(data.classes):
        rows = np.flatnonzero(data.labels == label)
        rows = rows[np.linspace(0, len(rows) - 1, min(each, len(rows))).astype(int)]
        lines = -(-each // columns)
        row = np.full((lines * columns, side, side, 3), 255, np.uint8)
        row[: len(rows)] = thumbnails(data.images[rows], side)
        images.append(row)
        names += [name] + [""] * (lines - 1)
    return grid(np.concatenate(images), columns, names)


def thumbnails(images, side=96):
    """(N, H, W, 1 or 3) uint8 -> (N, side, side, 3)."""
    pictures = (Image.fromarray(image.squeeze()).convert("RGB") for image in images)
    return np.array([picture.resize((side, side), Image.Resampling.LANCZOS) for picture in pictures]).reshape(-1, side, side, 3)


# ------------------------------------------------------------------------------------------------------------------
# 4.2.3  Pre-processing: crop, then resize, then [-1, 1]
# ------------------------------------------------------------------------------------------------------------------


def to_tensor(images):
    """4.2.3:  uint8 [0, 255] -> float [-1, 1],  x = u / 127.5 - 1.

    images: (B, H, W, C) uint8 array or tensor. Returns (B, 3, H, W) float32. One grey channel becomes three equal ones, on
    purpose: the letters model is to meet data of the same form as the paintings (4.2.1).
    """
    x = torch.as_tensor(images).permute(0, 3, 1, 2).float() / 127.5 - 1
    return x.expand(-1, 3, -1, -1) if x.shape[1] == 1 else x


def to_uint8(x):
    """Inverse of `to_tensor`: (B, 3, H, W) in [-1, 1], clamped -> (B, H, W, 3) uint8 array; exact on what `to_tensor` gives."""
    return ((x.float() + 1) * 127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 1).cpu().numpy()


def crop_and_resize(image, size):
    """4.2.3:  centre-crop to a square, then resize (anti-aliased): the order that deforms nothing. Pillow image in and out."""
    width, height = image.size
    side = min(width, height)
    left, top = (width - side) // 2, (height - side) // 2
    if (width, height) != (side, side):
        image = image.crop((left, top, left + side, top + side))
    return image if side == size else image.resize((size, size), Image.Resampling.LANCZOS)


# ------------------------------------------------------------------------------------------------------------------
# Packing: any images -> images.npy, labels.npy, sources.npy, set.json, and files.csv, which says what became of every file
# ------------------------------------------------------------------------------------------------------------------


def open_packed(path, size):
    """The set at `path` as an ImageSet over a memory map, packed beside it first if that was not done or the set changed.

    A folder counts as changed when a file is added to or removed from it, an .npz when its size or date changes.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path}: no such file or folder")
    root = path.resolve() if path.is_file() else class_root(path.resolve())
    folder = packed_folder(root, size)
    pack_once(folder, {"size": size, "files": source_state(root)}, partial(pack_classes, root), replace=True)
    return read_packed(folder, size)


def pack_once(folder, state, pack, replace=False):
    """Call pack(folder, state) unless `folder` holds that set. Of several processes of a machine one does; the others wait.

    Raises UserError if the folder holds something else; with `replace`, another packed set may go.
    """
    if packed_state(folder) == state:
        return
    with locked(folder):
        found = packed_state(folder)  # another process may have packed it meanwhile
        if found == state:
            return
        if folder.exists() and any(folder.iterdir()) and not (found and replace):
            what = "another packed set" if found else "other files"
            raise UserError(f"{folder} holds {what}; name another folder, or remove it first")
        pack(folder, state)


def packed_state(folder):
    """What the set in `folder` was packed from and how; None if there is none."""
    try:
        return json.loads((folder / "set.json").read_text())["state"]
    except (OSError, ValueError, KeyError):
        return None


@contextlib.contextmanager
def locked(folder):
    """One process of this machine at a time is inside this `with`; the lock goes with the process, however that ends."""
    if fcntl is None:
        yield
        return
    locks = Path(tempfile.gettempdir()) / f"color-diffusion-{os.getuid()}"
    locks.mkdir(mode=0o700, exist_ok=True)
    with (locks / hashlib.sha256(str(folder).encode()).hexdigest()[:12]).open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def read_packed(folder, size):
    """The packed set in `folder` over memory maps: Paintings if its labels are a palette's."""
    try:
        about = json.loads((folder / "set.json").read_text())
        arrays = [np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("images", "labels", "sources")]
        kind = Paintings if "palette" in about["state"] else ImageSet
        packed = kind(*arrays, about["classes"], about.get("note", ""))
    except (OSError, ValueError, KeyError, EOFError) as error:
        raise UserError(f"{folder}: a packed set that cannot be read ({error}); remove it and pack again") from error
    if packed.images.shape[1] != size:
        raise UserError(f"{folder}: packed at {packed.images.shape[1]} pixels, not {size}; pack it again with --size {size}")
    return packed


def pack(folder, state, classes, shape, files, sources, results, verb="packing"):
    """Write a packed set to `folder`, whole or not at all. After an interruption the same call goes on where it stopped.

    shape: of an image; files, sources: one name each for every file, or for every image where there are no files;
    results: function start -> iterator over the files from `start` on, giving (image, label) or (None, why it is rejected).
    """
    growing = folder.with_name(f".{folder.name}.unfinished")
    try:
        if not (growing / "state.json").exists() or json.loads((growing / "state.json").read_text()) != state:
            if growing.exists():
                _remove(growing)
            growing.mkdir(parents=True)
            (growing / "images.npy").touch()
            (growing / "results.txt").touch()
            (growing / "state.json").write_text(json.dumps(state))
        found = grow(growing, shape, f"{verb} {folder.name}", len(files), results)
        kept = np.array([isinstance(result, int) for result in found])
        reasons = Counter(result.partition(":")[0] for result in found if isinstance(result, str))
        note = ", ".join(f"{count:,} {reason}" for reason, count in reasons.most_common())
        if not kept.any():
            raise UserError(f"{folder}: nothing to pack, all of {len(files):,} files were rejected: {note}")
        rows = iter(range(len(found)))
        with (growing / "files.csv").open("w", newline="", encoding="utf-8", errors="surrogateescape") as file:
            table = csv.writer(file)
            table.writerow(("file", "source", "row", "label", "rejected"))
            for name, source, result in zip(files, sources, found):
                what = (next(rows), classes[result], "") if isinstance(result, int) else ("", "", result)
                table.writerow((name, source, *what))
        np.save(growing / "labels.npy", np.array(found, object)[kept].astype(np.int64))
        np.save(growing / "sources.npy", np.unique(sources, return_inverse=True)[1][kept])
        note = note and f"{len(found) - kept.sum():,} of {len(found):,} files rejected: {note} ({folder / 'files.csv'})"
        (growing / "set.json").write_text(json.dumps({"classes": list(classes), "note": note, "state": state}))
        if folder.exists():
            _remove(folder)
        os.replace(growing, folder)
    except UserError:
        _remove(growing)
        raise
    except OSError as error:  # a full disk, above all
        raise UserError(f"cannot write {folder}: {error.strerror or error}; the same command goes on from here") from error


def grow(folder, shape, name, count, results):
    """Append to folder/images.npy and results.txt until all `count` results are there; returns them.

    A result is noted only when its image is safely on the disk, so neither a kill nor a power cut can part the two.
    """
    with (folder / "images.npy").open("r+b") as images, (folder / "results.txt").open("r+") as journal:
        whole_lines = [line for line in journal if line.endswith("\n")]
        found = [json.loads(line) for line in whole_lines]
        journal.seek(0)
        journal.truncate(sum(map(len, whole_lines)))
        journal.seek(0, os.SEEK_END)
        npy_header(images, 0, shape)
        images.truncate(images.tell() + np.prod(shape) * sum(isinstance(result, int) for result in found))
        images.seek(0, os.SEEK_END)
        noted, clock = len(found), time.monotonic()

        def note():
            images.flush()
            os.fsync(images.fileno())
            journal.writelines(json.dumps(result) + "\n" for result in found[noted:])
            journal.flush()
            return len(found), time.monotonic()

        with tqdm(total=count, initial=noted, desc=name, unit="image", disable=None) as bar:
            try:
                for image, result in results(noted):
                    if image is not None:
                        images.write(image.tobytes())
                    found.append(result)
                    bar.update()
                    if time.monotonic() > clock + 1:
                        noted, clock = note()
            finally:
                note()
        npy_header(images, sum(isinstance(result, int) for result in found), shape)
    return found


def npy_header(file, count, shape):
    """(Re)write the header of an .npy file of `count` uint8 arrays; numpy leaves room for the count to grow in place."""
    file.seek(0)
    np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": (count, *shape)})


def in_processes(function, tasks, least, processes=None):
    """map(function, tasks) over processes, in order; with fewer than `least` in this one, as starting them takes longer."""
    if len(tasks) < least or processes == 1:
        yield from map(function, tasks)
        return
    with multiprocessing.get_context("spawn").Pool(processes, initializer=_ignore_interrupts) as pool:
        yield from pool.imap(function, tasks, chunksize=max(1, least // 16))


def _ignore_interrupts():  # Ctrl-C is the parent's to handle
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def packed_folder(root, size):
    """Beside the data; in the user's cache where that folder is read-only."""
    name = f"{root.name}.packed{size}"
    if os.access(root.parent, os.W_OK):
        return root.parent / name
    key = hashlib.sha256(str(root).encode()).hexdigest()[:12]
    return Path.home() / ".cache" / "color-diffusion" / f"{key}-{name}"


def class_root(folder):
    """The folder that holds the class folders: `folder`, or below it as long as there is just one folder and no image."""
    while True:
        inside = subfolders(folder)
        if not inside or any(is_image(file) for file in folder.iterdir()):
            raise UserError(f"{folder}: no folders with images in it; expected one folder of images for each class")
        if len(inside) > 1:
            return folder
        folder = inside[0]


def subfolders(folder):
    hidden = (".", "__MACOSX")
    inside = (f for f in folder.iterdir() if f.is_dir() and not f.name.startswith(hidden) and ".packed" not in f.name)
    return sorted(inside)


def is_image(file):
    return file.suffix.lower() in IMAGE_SUFFIXES and not file.name.startswith(".")


def source_state(root):
    """What tells cheaply, without listing the files, whether a set was changed since it was packed."""
    if root.is_file():
        return [root.stat().st_size, root.stat().st_mtime_ns]
    return [[folder.name, folder.stat().st_mtime_ns] for folder in subfolders(root)]


def pack_classes(root, folder, state):
    """Pack a tree of class folders, or an .npz."""
    classes, files, labels, sources, channels, images = (read_npz if root.is_file() else read_tree)(root, state["size"])
    check_alphabet(root, classes)

    def results(start):
        return zip(images(start), labels[start:].tolist())

    pack(folder, state, classes, (state["size"], state["size"], channels), files, sources, results)


def check_alphabet(root, classes):
    """A set of capital letters must have all 26: a missing folder is far likelier than a wish for 25 labels."""
    if set(classes) < set(ALPHABET):
        missing = " ".join(sorted(set(ALPHABET) - set(classes)))
        raise UserError(f"{root}: {len(classes)} classes, but the alphabet has 26; missing: {missing}")


def sources_of(names, labels):
    """The source (font) of every image, as numbers.

    Files of the same name in several class folders come from the same font, as in the Kaggle set; where names are not
    shared, or there are none (npz), the k-th image of every class is taken for source k.
    """
    labels = np.asarray(labels)
    if names is not None:
        unique, sources = np.unique(names, return_inverse=True)
        if len(unique) <= 2 * np.bincount(labels).max():
            return sources
    order = np.argsort(labels, kind="stable")
    starts = np.searchsorted(labels[order], labels[order])
    sources = np.empty(len(labels), np.int64)
    sources[order] = np.arange(len(labels)) - starts
    return sources


def read_tree(root, size):
    """A folder of class folders -> (classes, files, labels, sources, channels, function start -> iterator of arrays)."""
    classes, files, labels, firsts = [], [], [], []
    for folder in subfolders(root):
        inside = sorted(file for file in folder.iterdir() if is_image(file))
        if not inside:
            raise UserError(f"{folder}: no images in it (expected {', '.join(sorted(IMAGE_SUFFIXES))}); remove the folder")
        labels += [len(classes)] * len(inside)
        classes.append(folder.name)
        files += inside
        firsts.append(inside[0])
    grey = all(open_image(file).mode in ("1", "L", "LA", "I;16") for file in firsts)
    load = partial(load_image, size=size, mode="L" if grey else "RGB")
    names, sources = [file.relative_to(root) for file in files], sources_of([file.stem for file in files], labels)
    return classes, names, np.array(labels), sources, 1 if grey else 3, lambda start: in_processes(load, files[start:], 2000)


def open_image(file):
    try:
        return Image.open(file)
    except (OSError, Image.DecompressionBombError) as error:
        raise UserError(f"{file}: not an image that can be read; remove it or replace it") from error


def upright_8_bit(image):
    """A Pillow image turned as the camera was held, 16-bit values scaled to 8 bits; UserError for 32 bits."""
    if image.mode == "F" or image.mode == "I" and image.getextrema()[1] > 65535:
        raise UserError("32-bit pixels: which value is white is not known")
    ImageOps.exif_transpose(image, in_place=True)  # first: what follows forgets how the camera was held
    if not image.mode.startswith("I"):
        return image
    deep, clear = np.asarray(image), image.info.get("transparency", -1)
    return Image.fromarray(np.where(deep == clear, 255, np.rint(deep * (255 / 65535))).astype(np.uint8))


def on_paper(image):
    """A Pillow image without transparency: what shows through is white."""
    if not image.has_transparency_data:
        return image
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))


def load_image(file, size, mode="RGB"):
    """One image, cropped to the centre square and resized: (size, size, C) uint8, C = 1 for mode "L", 3 for "RGB"."""
    image = open_image(file)
    try:
        image = crop_and_resize(on_paper(upright_8_bit(image)).convert(mode), size)
    except Exception as error:  # damaged files raise whatever the decoder stumbles on
        raise UserError(f"{file}: not an image that can be read ({error}); remove it or replace it") from error
    return np.asarray(image).reshape(size, size, -1)


def check_npz(path, images, labels):
    """Raises UserError for arrays of an .npz that are no images with labels."""
    fits = images.dtype == np.uint8 and (images.ndim == 3 or images.ndim == 4 and images.shape[-1] in (1, 3)) and len(images)
    if not fits or labels.shape != images.shape[:1] or labels.dtype.kind not in "iuU":
        found = f"images {images.dtype} {images.shape} and labels {labels.dtype} {labels.shape}"
        raise UserError(f"{path}: expected uint8 images (N, H, W), (N, H, W, 1 or 3) and N labels, found {found}")


def read_npz(path, size):
    """An .npz with `images` (N, H, W) or (N, H, W, C) uint8 and `labels` (N,), as `read_tree` returns it."""
    try:
        with np.load(path, allow_pickle=False) as file:
            missing = {"images", "labels"} - set(file.files)
            if missing:
                raise UserError(f"{path}: no array {' and '.join(sorted(missing))}; it holds: {', '.join(file.files)}")
            array, labels = file["images"], file["labels"]
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, AttributeError, TypeError) as error:
        raise UserError(f"{path}: not an .npz file that can be read") from error
    check_npz(path, array, labels)
    values, numbers = np.unique(labels, return_inverse=True)
    classes = [str(value) for value in values]
    if np.issubdtype(labels.dtype, np.integer):
        if values.min() < 0 or values.max() > 25:
            raise UserError(f"{path}: labels from {values.min()} to {values.max()}; expected 0 to 25 for A to Z")
        classes = [ALPHABET[value] for value in values]
    array = array.reshape(*array.shape[:3], -1)

    def images(start):
        for image in array[start:]:
            if image.shape[:2] != (size, size):
                image = np.asarray(crop_and_resize(Image.fromarray(image.squeeze()), size)).reshape(size, size, -1)
            yield image

    return classes, range(len(array)), numbers, sources_of(None, numbers), array.shape[-1], images


# ------------------------------------------------------------------------------------------------------------------
# Which rows an update sees: functions of (seed, n), the same in every process
# ------------------------------------------------------------------------------------------------------------------


def rng(*key):
    """A CPU generator that is a function of `key`, whole numbers."""
    return torch.Generator().manual_seed(int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0]))


@lru_cache(maxsize=64)
def permutation(n, *key):
    return torch.randperm(n, generator=rng(*key)).numpy()


def endless(position, size, seed, *key):
    """The entries `position` of an endless chain of permutations of `size` rows, one an epoch."""
    epoch, place = np.divmod(position, size)
    rows = np.empty(len(position), np.int64)
    for e in np.unique(epoch):
        rows[epoch == e] = permutation(size, seed, int(e), *key)[place[epoch == e]]
    return rows


def rows_of_update(seed, n, batch, size):
    """Which of `size` images update n (from 0) sees: the next `batch` of an endless chain of permutations, one an epoch.

    With several processes, `batch` is that of all together and process r of R takes rows[r::R].
    """
    return endless(np.arange(n * batch, (n + 1) * batch), size, seed, 1)


def balanced_rows_of_update(seed, n, batch, labels):
    """4.2.2, against the un-balancing: like `rows_of_update`, but every label is seen equally often, however rare it is.

    Labels take turns, so a batch has equal shares as far as its size allows; each goes through permutations of its own
    images, so none returns before all of its label were seen. The batch is then shuffled, or a process whose stride shares
    a factor with the number of labels would always see the same few. labels: (N,), of the images to draw from.
    """
    present = np.unique(labels)
    turn, label = np.divmod(np.arange(n * batch, (n + 1) * batch), len(present))
    rows = np.empty(batch, np.int64)
    for k, value in enumerate(present):
        members = np.flatnonzero(labels == value)
        rows[label == k] = members[endless(turn[label == k], len(members), seed, 4, k)]
    return rows[torch.randperm(batch, generator=rng(seed, n, 6)).numpy()]


# ------------------------------------------------------------------------------------------------------------------
# The embedded painter: abstract pictures dominated by a colour, for those who have no paintings at hand
# ------------------------------------------------------------------------------------------------------------------

PAINTER = 1  # to be raised when its pictures change: kept ones are then painted anew
PIGMENTS = {
    "ivory black": (28, 26, 30), "titanium white": (248, 245, 236), "raw umber": (93, 66, 46), "burnt sienna": (150, 62, 26),
    "yellow ochre": (204, 153, 51), "cadmium yellow": (255, 222, 40), "cadmium orange": (238, 118, 24),
    "vermilion": (224, 58, 44), "alizarin": (140, 22, 48), "rose": (232, 150, 158), "ultramarine": (30, 40, 138),
    "cobalt": (0, 88, 180), "cerulean": (92, 170, 214), "turquoise": (60, 176, 164), "viridian": (24, 104, 84),
    "sap green": (120, 150, 50), "dioxazine violet": (84, 38, 116), "lilac": (188, 164, 208),
    "naples yellow": (250, 216, 156), "warm grey": (146, 138, 130),
}  # fmt: skip


def paint(seed, label, size=256):
    """An abstract picture whose mean colour is nearest to that of `label`, a number: (size, size, 3) uint8.

    A function of its arguments: a composition, drawn by lot, of a few strokes in mixtures of that colour and a few accents.
    """
    rng = np.random.default_rng([seed, label])
    easel = Easel(rng, size * 3 // 2, list(COLOURS.values())[label])
    composition = COMPOSITIONS[rng.integers(len(COMPOSITIONS))]
    composition(easel)
    upright = composition in (soft_fields, zips)
    angle = rng.normal(0, 0.06) + rng.integers(4) * np.pi / 2 if upright else rng.uniform(0, 2 * np.pi)
    c, s, n = np.cos(angle), np.sin(angle), easel.n
    side = n / (abs(c) + abs(s)) * rng.uniform(0.8, 1)  # the largest square so turned, and a little closer
    k, left, top = side / size, (n - side * (c - s)) / 2, (n - side * (s + c)) / 2
    affine = (k * c, -k * s, left, k * s, k * c, top)
    picture = Image.fromarray(easel.finished())
    picture = picture.transform((size, size), Image.Transform.AFFINE, affine, Image.Resampling.BICUBIC)
    return glaze(np.asarray(picture), label)


def smooth(low, high, t):
    """0 below `low`, 1 above `high`, smooth between."""
    t = np.clip((t - low) / (high - low), 0, 1)
    return t * t * (3 - 2 * t)


class Easel:
    """A canvas of n x n pixels, the colours for it and the strokes. x and y run from -1 to 1; `paint` is RGB and a relief."""

    def __init__(self, rng, n, colour):
        self.rng, self.n = rng, n
        self.y, self.x = np.mgrid[-1 : 1 : n * 1j, -1 : 1 : n * 1j].astype(np.float32)
        self.paint = np.zeros((n, n, 4), np.float32)
        # mixtures: darker and lighter, each with a touch of some pigment; accents: pigments, rather far from the colour
        colour, pigments = np.array(colour, np.float32), np.array(list(PIGMENTS.values()), np.float32)
        darkest = 0.55 - 0.4 * colour @ (0.2, 0.6, 0.2) / 255
        steps = rng.permutation(np.linspace(-darkest, 0.6, 6) + rng.uniform(-0.1, 0.1, 6))[:, None].astype(np.float32)
        shades = colour + np.abs(steps) * (np.where(steps < 0, 0, 255) - colour)
        self.mixtures = shades + rng.uniform(0, 0.3, (6, 1)).astype(np.float32) * (rng.choice(pigments, 6) - shades)
        distance = label_distances(rgb_to_lab(pigments), "lab", {"": colour})[:, 0]
        self.accents = rng.choice(pigments, rng.integers(2, 5), replace=False, p=distance / distance.sum())

    def colour(self, accent=0.3):
        """An accent with that probability, else something between two mixtures."""
        if self.rng.uniform() < accent:
            return self.rng.choice(self.accents)
        a, b = self.rng.choice(self.mixtures, 2)
        return a + (b - a) * self.rng.uniform()

    def noise(self, across, down=None, shape=None):
        """Smooth noise, about 0 to 1, of so many cells; on the whole canvas or an array of `shape`."""
        height, width = shape or (self.n, self.n)
        across, down = int(across), int(down or across)
        small = Image.fromarray(self.rng.uniform(0, 1, (down + 2, across + 2)).astype(np.float32))
        box = (0.5, 0.5, across + 1.5, down + 1.5)
        return np.asarray(small.resize((width, height), Image.Resampling.BICUBIC, box))

    def cloud(self, cells, octaves=4):
        return sum(self.noise(cells << k) * 0.5**k for k in range(octaves)) / (2 - 0.5 ** (octaves - 1))

    def ramp(self, t, colours):
        """The colours along t, 0 to 1."""
        places = np.linspace(0, len(colours) - 1, 256)
        table = np.stack([np.interp(places, range(len(colours)), channel) for channel in np.transpose(colours)], 1)
        return table.astype(np.float32)[np.clip(t * 255, 0, 255).astype(np.uint8)]

    def window(self, left, top, right, bottom):
        a, b, c, d = (int(np.clip((v + 1) / 2 * self.n, 0, self.n)) for v in (top, bottom + 0.02, left, right + 0.02))
        return slice(a, b), slice(c, d)

    def lay(self, colour, alpha, relief, window=(slice(None), slice(None))):
        """Paint over what is in the window; an alpha of 1 covers it."""
        under = self.paint[window]
        under[..., :3] += alpha[..., None] * (colour - under[..., :3])
        under[..., 3] += alpha * (relief - under[..., 3])

    def ground(self, contrast=1.0):
        """A brushed ground: streaks in one direction over clouds."""
        r = self.rng
        streak = 0.6 * self.noise(r.integers(2, 9), r.integers(40, 110)) + 0.4 * self.noise(
            r.integers(1, 4), r.integers(10, 40)
        )
        t = 0.5 + contrast * (r.uniform(0.5, 1.8) * (self.cloud(2, 3) - 0.5) + r.uniform(0.3, 1) * (streak - 0.5))
        self.lay(self.ramp(t, r.permutation(self.mixtures)[:4]), np.ones_like(t), streak)

    def stroke(self, x, y, radius, start, sweep, width, colour, dry=0.8):
        """A loaded brush along an arc about (x, y); its bristles run dry one by one. A sweep of 2 pi is a circle."""
        ends = start + sweep * np.linspace(0, 1, 24)
        path = np.stack([x + radius * np.cos(ends), y + radius * np.sin(ends)])
        w = self.window(*(path.min(1) - width), *(path.max(1) + width))
        dx, dy = self.x[w] - np.float32(x), self.y[w] - np.float32(y)
        if not dx.size:
            return
        u = (np.arctan2(dy, dx) - np.float32(start)) % np.float32(2 * np.pi) / np.float32(sweep)  # along the stroke, 0 to 1
        v = (np.hypot(dx, dy) - np.float32(radius)) / np.float32(width)  # across, -1 to 1
        column = np.clip(u * 255, 0, 255).astype(np.int32)
        v += 0.12 * (self.noise(7, 1, shape=(1, 256))[0] - 0.5)[column]  # the hand is not quite steady
        hairs = max(6, width * self.n / 5)
        brush = 0.65 * self.noise(5, hairs, shape=(128, 256)) + 0.35 * self.noise(24, hairs, shape=(128, 256))
        bristle = brush[np.clip((v + 1) * 63.5, 0, 127).astype(np.int32), column]
        alpha = smooth(0, 6 / (width * self.n), 1 - np.abs(v) - 0.15 * (bristle < 0.4))
        alpha *= smooth(0, 0.2, bristle + 0.35 - 1.2 * dry * u**1.5)
        if sweep < 6.2:
            alpha *= (u < 1 - 0.12 * bristle) * smooth(0, 0.03, u - 0.05 * bristle)
        second = colour + self.rng.normal(0, 22, 3)
        self.lay(self.ramp(1.3 * bristle - 0.15, [colour, second]), alpha, 1.6 * bristle, w)

    def gesture(self, reach=1.0, accent=0.3):
        """A stroke of the arm, somewhere, more or less bent."""
        r = self.rng
        radius, width, angle = r.uniform(0.5, 3) * reach, r.uniform(0.03, 0.22) * reach, r.uniform(0, 2 * np.pi)
        x, y = r.uniform(-0.8, 0.8, 2) - radius * np.array([np.cos(angle), np.sin(angle)])
        sweep = min(5, r.uniform(0.6, 1.8) * reach / radius)
        self.stroke(x, y, radius, angle - sweep / 2, sweep, width, self.colour(accent), r.uniform(0.3, 1.3))

    def field(self, x, y, half_width, half_height, colour, soft, opacity):
        """A soft-edged rectangle of thin paint."""
        wash = self.cloud(3)
        edge = np.minimum(half_width - np.abs(self.x - x), half_height - np.abs(self.y - y)) + 0.12 * (self.cloud(5, 3) - 0.5)
        self.lay(colour + 60 * (wash[..., None] - 0.5), smooth(0, soft, edge) * opacity * (0.75 + 0.4 * wash), wash)

    def blob(self, x, y, size, colour, soft=0.01):
        """A rounded shape of brushed paint."""
        w = self.window(x - 1.7 * size, y - 1.7 * size, x + 1.7 * size, y + 1.7 * size)
        dx, dy = self.x[w] - np.float32(x), self.y[w] - np.float32(y)
        angle, edge = np.arctan2(dy, dx), 1 - np.hypot(dx, dy) / np.float32(size)
        for k in (1, 2, 3, 5):
            edge += np.float32(self.rng.normal(0, 0.25 / k)) * np.cos(k * angle + np.float32(self.rng.uniform(0, 6.3)))
        hair = self.noise(3, 40 * size + 3, shape=dx.shape)
        self.lay(colour + 45 * (hair[..., None] - 0.5), smooth(0, soft / size, edge + 0.1 * (hair - 0.5)), 0.8 + 0.7 * hair, w)

    def drawn(self, draw):
        """Lay what draw(shape, points or box, colour, ...) draws with Pillow, anti-aliased."""
        sheet, mask = (Image.new(mode, (2 * self.n, 2 * self.n)) for mode in ("RGB", "L"))
        pens = ImageDraw.Draw(sheet), ImageDraw.Draw(mask)

        def both(shape, xy, colour, *more):
            for pen, ink in zip(pens, (tuple(np.clip(colour, 0, 255).astype(int)), 255)):
                getattr(pen, shape)([tuple(point) for point in (np.asarray(xy) + 1) * self.n], ink, *more)

        draw(both)
        alpha = np.asarray(mask.reduce(2), np.float32) / 255
        self.lay(np.asarray(sheet.reduce(2), np.float32) / np.maximum(alpha, 1 / 255)[..., None], alpha, 0.6 + 0.8 * alpha)

    def splatter(self, drops, accent=0.5):
        """Thrown paint: many drops of two colours, a few of them large."""
        r, colours = self.rng, [self.colour(accent), self.colour(accent)]
        places = r.uniform(-0.7, 0.7, 2) + r.normal(0, r.uniform(0.15, 0.6), (drops, 2))
        sizes = np.minimum(0.003 + 0.004 * r.pareto(1.5, drops), 0.07)

        def draw(pen):
            for i, (place, size) in enumerate(zip(places, sizes)):
                pen("ellipse", [place - size, place + size], colours[i % 2])

        self.drawn(draw)

    def drips(self, threads, accent=0.5, width=0.01):
        """Threads of thrown paint, thick where the hand was slow."""
        r, t = self.rng, np.linspace(0, 2 * np.pi, 140)

        def draw(pen):
            for _ in range(threads):
                turns = (r.normal(0, 0.8 / k, (2, 1)) * np.sin(k * t + r.uniform(0, 6.3, (2, 1))) for k in (1, 2, 3, 5))
                path = (r.uniform(-0.9, 0.9, (2, 1)) + sum(turns)).T
                thickness = r.uniform(0.3, 1.5) * width * np.exp(3 * self.noise(12, 1, shape=(1, 140))[0] - 1.5)
                colour = self.colour(accent)
                for a, b, half in zip(path, path[1:], thickness):
                    pen("line", [a, b], colour, max(1, int(2 * half * self.n)))
                    pen("ellipse", [b - half, b + half], colour)

        self.drawn(draw)

    def facets(self, count, accent=0.2, tilt=1.0):
        """The canvas cut along straight lines, every piece brushed in a direction of its own."""
        r, pieces, turn = self.rng, [np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)], float)], Image.new("F", (self.n, self.n))
        while len(pieces) < count:
            sizes = [np.ptp(piece, 0).prod() * r.uniform(0.3, 1) for piece in pieces]
            piece, angle = pieces.pop(int(np.argmax(sizes))), r.normal(0, tilt) + r.choice([0, np.pi / 2])
            side = (piece - r.dirichlet(np.full(len(piece), 3.0)) @ piece) @ (np.cos(angle), np.sin(angle))
            halves = [], []
            for a, b, s, t in zip(piece, np.roll(piece, -1, 0), side, np.roll(side, -1)):
                halves[int(s > 0)].append(a)
                if (s > 0) != (t > 0):
                    for half in halves:
                        half.append(a + (b - a) * s / (s - t))
            pieces += [np.array(half) for half in halves if len(half) > 2]

        def draw(pen):
            for piece in pieces:
                pen("polygon", piece, self.colour(accent))
                ImageDraw.Draw(turn).polygon([tuple(point) for point in (piece + 1) * self.n / 2], r.uniform(0, 6.3))

        self.drawn(draw)
        turn = np.asarray(turn)
        along = self.x * np.cos(turn) + self.y * np.sin(turn) + 0.06 * self.noise(6) + turn
        hair = self.noise(240, 1, shape=(1, 4096))[0][(along * 450).astype(np.int32) % 4096]
        self.paint[..., :3] += (30 * np.sin(2 * along) + 26 * (hair - 0.5))[..., None]
        self.paint[..., 3] = hair

    def marble(self, colours, bands=1.5):
        """Marbling: bands of paint bent by clouds, with fine veins."""
        r, angle = self.rng, self.rng.uniform(0, np.pi)
        bend = r.uniform(1.2, 3) * (self.cloud(2, 3) + 0.35 * self.cloud(7, 3))
        t = bands * (0.4 * (self.x * np.cos(angle) + self.y * np.sin(angle)) + bend)
        vein = smooth(0.75, 1, np.abs(np.sin(r.integers(3, 9) * np.pi * t))) * self.noise(5)
        t = np.abs(t % 2 - 1)
        self.lay(self.ramp(t, colours) + r.normal(0, 60) * vein[..., None], np.ones_like(t), 0.5 * t + 0.5 * vein)

    def finished(self):
        """Light from the upper left on the relief, with a little of the canvas: the picture, (n, n, 3) uint8."""
        relief = self.paint[..., 3] + 0.1 * self.noise(self.n // 2)
        light = np.zeros_like(relief)
        light[1:, 1:] = relief[1:, 1:] - relief[:-1, :-1]
        return np.clip(self.paint[..., :3] + 60 * light[..., None], 0, 255).astype(np.uint8)


def glaze(picture, label):
    """A tint just strong enough for the label colour to be the one nearest to the mean, in RGB and in LAB. Arrays uint8."""
    thumbnail = picture[::4, ::4].astype(np.float32)
    tint = np.array(list(COLOURS.values())[label]) - thumbnail.mean((0, 1))
    for strength in np.linspace(0, 1, 21):
        tinted = np.clip(thumbnail + strength * tint, 0, 255).astype(np.uint8)
        if all(nearest_colour(mean_colour(tinted, space), space) == label for space in ("rgb", "lab")):
            break
    return np.clip(picture + np.float32(strength + 0.03) * tint.astype(np.float32), 0, 255).astype(np.uint8)


def gestures(e):
    e.ground()
    for reach in np.sort(e.rng.uniform(0.4, 1.9, e.rng.integers(8, 24)))[::-1]:
        e.gesture(reach)
    for _ in range(e.rng.integers(0, 3)):
        e.splatter(60)


def soft_fields(e):
    e.ground(0.35)
    edges = np.cumsum([-0.9, *1.8 * e.rng.dirichlet(np.full(e.rng.integers(2, 5), 2.5))])
    for top, bottom in zip(edges, edges[1:]):
        for soft in (0.25, 0.08):
            place = (e.rng.normal(0, 0.02), (top + bottom) / 2, e.rng.uniform(0.7, 0.85), (bottom - top) / 2 - 0.02)
            e.field(*place, e.colour(0.45), soft, e.rng.uniform(0.5, 0.95))


def shards(e):
    e.facets(e.rng.integers(10, 70), 0.25, e.rng.choice([0.05, 0.4, 1.5]))
    for _ in range(e.rng.integers(0, 4)):
        e.gesture(0.8, 0.4)


def circles(e):
    e.ground() if e.rng.uniform() < 0.5 else e.facets(e.rng.integers(3, 9), 0.15, 0.3)
    for radius in np.sort(e.rng.uniform(0.12, 0.8, e.rng.integers(3, 9)))[::-1]:
        x, y = e.rng.uniform(-0.8, 0.8, 2)
        while radius > 0.03:
            width = min(radius / 2, e.rng.uniform(0.01, 0.16))
            sweep = 2 * np.pi if e.rng.uniform() < 0.6 else e.rng.uniform(1.5, 5)
            e.stroke(x, y, radius - width, e.rng.uniform(0, 6.3), sweep, width, e.colour(0.35), e.rng.uniform(0, 0.7))
            radius -= 2 * width + e.rng.choice([0, 0, 0.05])


def threads(e):
    e.ground(0.6)
    for _ in range(e.rng.integers(3, 7)):
        e.drips(e.rng.integers(1, 6), 0.45, e.rng.uniform(0.004, 0.014))
        e.splatter(60)


def marbling(e):
    e.marble(e.rng.permutation([*e.mixtures, e.colour(1)]), e.rng.uniform(0.8, 3))
    for _ in range(e.rng.integers(0, 3)):
        e.splatter(40)


def shapes(e):
    e.ground(0.7) if e.rng.uniform() < 0.6 else e.marble(e.mixtures[1:4], 0.7)
    for size in np.sort(e.rng.uniform(0.04, 0.5, e.rng.integers(6, 18)))[::-1]:
        e.blob(*e.rng.uniform(-0.9, 0.9, 2), size, e.colour(0.35), e.rng.choice([0.01, 0.01, 0.15]))
    e.drips(e.rng.integers(0, 5), 0.7, 0.004)


def zips(e):
    e.ground(0.8)
    for x in e.rng.uniform(-0.9, 0.9, e.rng.integers(3, 12)):
        width = e.rng.choice([0.015, 0.03, 0.12, 0.3])
        e.stroke(x - 60, e.rng.uniform(-0.1, 0.1), 60, -0.018, 0.036, width, e.colour(0.4), e.rng.uniform(0, 1))
    if e.rng.uniform() < 0.4:
        e.gesture(1.2, 0.5)


COMPOSITIONS = (gestures, soft_fields, shards, circles, threads, marbling, shapes, zips)


def paint_set(folder, size=256, count=2000, seed=0, shares="balanced", processes=None, replace=False):
    """Paint a packed set of `count` pictures into `folder`: all labels alike, or in table 4.1's shares. Returns the set."""
    state = {"painter": PAINTER, "size": size, "count": count, "seed": seed, "shares": shares}
    state["palette"] = {name: list(rgb) for name, rgb in COLOURS.items()}

    def pack_pictures(folder, state):
        weights = np.array(TABLE_4_1 if shares == "table" else [1] * len(COLOURS))
        ends = np.rint(np.cumsum(weights) / weights.sum() * count)
        labels = np.random.default_rng(seed).permutation(np.searchsorted(ends, np.arange(count), side="right")).tolist()
        tasks = [(seed * 2**32 + i, label) for i, label in enumerate(labels)]

        def results(start):
            pictures = in_processes(partial(_paint, size=size), tasks[start:], 64, processes)
            return zip(pictures, labels[start:])

        names = [f"picture {i}" for i in range(count)]
        pack(folder, state, list(COLOURS), (size, size, 3), names, names, results, "painting")

    pack_once(folder, state, pack_pictures, replace)
    return read_packed(folder, size)


def _paint(task, size):
    return paint(*task, size)


# ------------------------------------------------------------------------------------------------------------------
# Pictures: grids, strips, charts (Pillow only)
# ------------------------------------------------------------------------------------------------------------------

INK, PAPER, RULE = (40, 40, 44), (255, 255, 255), (225, 225, 228)
PALETTE = [(31, 98, 180), (214, 93, 14), (54, 140, 66), (150, 60, 160)]


def font(size):
    return ImageFont.load_default(size)


def grid(images, columns, names=None, scale=1, gap=2):
    """Images (N, H, W, 3) uint8 row by row as one picture, `columns` a row, with a name at the left of every row."""
    n, height, width = images.shape[:3]
    rows = -(-n // columns)
    height, width = height * scale, width * scale
    margin = 0
    if names:
        text = font(min(18, max(11, height // 3)))
        margin = 12 + int(max(text.getlength(name) for name in names))
    picture = Image.new("RGB", (margin + columns * (width + gap) + gap, rows * (height + gap) + gap), PAPER)
    draw = ImageDraw.Draw(picture)
    for i, image in enumerate(images):
        row, column = divmod(i, columns)
        tile = Image.fromarray(image).resize((width, height), Image.Resampling.NEAREST)
        picture.paste(tile, (margin + gap + column * (width + gap), gap + row * (height + gap)))
    for row, name in enumerate(names or []):
        draw.text((margin - 6, gap + row * (height + gap) + height // 2), name, INK, text, anchor="rm")
    return picture


def side_by_side(pictures, titles):
    """Pictures of one height in a row, each under its title."""
    joined = Image.new("RGB", (sum(picture.width for picture in pictures), 24 + pictures[0].height), PAPER)
    draw, x = ImageDraw.Draw(joined), 0
    for picture, title in zip(pictures, titles):
        joined.paste(picture, (x, 24))
        draw.text((x + picture.width // 2, 12), title, INK, font(15), anchor="mm")
        x += picture.width
    return joined


def stacked(pictures):
    """Pictures one below the other."""
    joined = Image.new("RGB", (max(picture.width for picture in pictures), sum(p.height for p in pictures)), PAPER)
    for i, picture in enumerate(pictures):
        joined.paste(picture, (0, sum(p.height for p in pictures[:i])))
    return joined


def chart(lines, title, x_label, y_label, size=(900, 460)):
    """A line chart with a logarithmic y axis.

    lines: name -> list of pieces, a piece being (xs, ys); pieces of a line are not joined, so an interruption shows as a gap.
    Values that are not above 0, or not finite, are left out.
    """
    s = 2  # drawn at twice the size and reduced, for smooth lines
    width, height = size[0] * s, size[1] * s
    left, right, top, bottom = 74 * s, width - 20 * s, 44 * s, height - 52 * s
    picture = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(picture)

    def drawable(xs, ys):
        xs, ys = np.asarray(xs, float), np.asarray(ys, float)
        kept = (ys > 0) & np.isfinite(ys)
        return xs[kept], ys[kept]

    lines = {name: [drawable(*piece) for piece in line] for name, line in lines.items()}
    pieces = [piece for line in lines.values() for piece in line if len(piece[0])]
    draw.text((left, 22 * s), title, INK, font(15 * s), anchor="lm")
    if pieces:
        xs, ys = np.concatenate([p[0] for p in pieces]), np.concatenate([p[1] for p in pieces])
        x_max = max(xs.max(), 1)
        low, high = np.log10(ys.min()) - 0.03, np.log10(ys.max()) + 0.03

        def place(x, y):
            return left + (right - left) * x / x_max, bottom - (bottom - top) * (np.log10(y) - low) / (high - low)

        for tick in log_ticks(10**low, 10**high):
            y = place(0, tick)[1]
            draw.line((left, y, right, y), RULE, s)
            draw.text((left - 8 * s, y), f"{tick:g}", INK, font(11 * s), anchor="rm")
        for tick in linear_ticks(x_max):
            x = place(tick, 10**low)[0]
            draw.line((x, bottom, x, bottom + 4 * s), INK, s)
            draw.text((x, bottom + 14 * s), f"{tick:,.0f}", INK, font(11 * s), anchor="mm")
        legend = right
        for (name, line), colour in reversed(list(zip(lines.items(), PALETTE))):
            for xs, ys in line:
                points = [place(x, y) for x, y in zip(xs, ys)]
                if len(points) > 1:
                    draw.line(points, colour, 2 * s, joint="curve")
                for x, y in points if len(points) == 1 else []:
                    draw.ellipse((x - 3 * s, y - 3 * s, x + 3 * s, y + 3 * s), colour)
            legend -= font(12 * s).getlength(name) + 40 * s
            draw.line((legend, 22 * s, legend + 18 * s, 22 * s), colour, 3 * s)
            draw.text((legend + 24 * s, 22 * s), name, INK, font(12 * s), anchor="lm")
    draw.line((left, top, left, bottom, right, bottom), INK, s)
    draw.text((right, height - 16 * s), x_label, INK, font(12 * s), anchor="rm")
    draw.text((left, top - 8 * s), y_label, INK, font(11 * s), anchor="lm")
    return picture.resize(size, Image.Resampling.LANCZOS)


def bars(rows, value, title, error=None, size=(900, 330)):
    """Figures 4.3 and 5.5 to 5.7: a bar chart, a group of bars a label and a bar a set.

    rows: dicts with label, set and numbers under the names `value` and `error`, if there is one. A value that is NaN has no
    bar, an error that is NaN no line.
    """
    s = 2  # as in `chart`
    rows = [row | {"reach": np.nan_to_num(row[error]) if error else 0.0} for row in rows if np.isfinite(row[value])]
    labels, sets = (list(dict.fromkeys(row[key] for row in rows)) for key in ("label", "set"))
    picture = Image.new("RGB", (size[0] * s, size[1] * s), PAPER)
    draw = ImageDraw.Draw(picture)
    left, right, top, bottom = 70 * s, size[0] * s - 20 * s, 52 * s, size[1] * s - 34 * s
    draw.text((left, 20 * s), title, INK, font(15 * s), anchor="lm")
    highest = max([row[value] + row["reach"] for row in rows] + [1e-9]) * 1.08
    for tick in linear_ticks(highest, 5):
        y = bottom - (bottom - top) * tick / highest
        draw.line((left, y, right, y), RULE, s)
        draw.text((left - 8 * s, y), f"{tick:g}", INK, font(11 * s), anchor="rm")
    step = (right - left) / max(1, len(labels))
    width = min(0.8 * step / max(1, len(sets)), 64 * s)
    paint = {name: (150, 150, 156) if name == "real" else None for name in sets}
    paint |= dict(zip((name for name in sets if name != "real"), PALETTE * len(sets)))
    for row in rows:
        x = left + step * (labels.index(row["label"]) + 0.5) + width * (sets.index(row["set"]) - len(sets) / 2)
        y = bottom - (bottom - top) * max(0, row[value]) / highest
        draw.rectangle((x + s, min(y, bottom - s), x + width - s, bottom), paint[row["set"]])
        middle, reach = x + width / 2, (bottom - top) * row["reach"] / highest
        if reach:
            draw.line((middle, y - reach, middle, min(bottom, y + reach)), INK, s)
        if width > 24 * s:
            draw.text((middle, y - 7 * s - reach), f"{row[value]:.3g}", INK, font(9 * s), anchor="mm")
    for i, label in enumerate(labels):
        x, y, text = left + step * (i + 0.5), bottom + 16 * s, font(12 * s)
        if label in COLOURS:
            x += 8 * s
            edge = x - text.getlength(label) / 2 - 8 * s
            draw.ellipse((edge - 10 * s, y - 5 * s, edge, y + 5 * s), COLOURS[label], outline=INK)
        draw.text((x, y), label, INK, text, anchor="mm")
    legend = right
    for name in reversed(sets):
        legend -= font(12 * s).getlength(name) + 34 * s
        draw.rectangle((legend, 15 * s, legend + 12 * s, 26 * s), paint[name])
        draw.text((legend + 18 * s, 20 * s), name, INK, font(12 * s), anchor="lm")
    draw.line((left, bottom, right, bottom), INK, s)
    return picture.resize(size, Image.Resampling.LANCZOS)


def log_ticks(low, high):
    """Ticks 1, 2, 5 x 10^k within [low, high]; finer ones where fewer than three fit."""
    for steps in ((1, 2, 5), (1, 1.5, 2, 3, 4, 5, 6, 8), tuple(np.arange(10, 100) / 10)):
        decades = range(int(np.floor(np.log10(low))), int(np.ceil(np.log10(high))) + 1)
        ticks = [step * 10.0**k for k in decades for step in steps if low <= step * 10.0**k <= high]
        if len(ticks) >= 3:
            break
    return ticks


def linear_ticks(high, count=6):
    """Round numbers from 0 to `high`."""
    raw = high / count
    power = 10 ** np.floor(np.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw)
    return np.arange(0, high + 1e-9, step)


# ------------------------------------------------------------------------------------------------------------------
# Command line
# ------------------------------------------------------------------------------------------------------------------


def palette_of(words):
    """["name=#rrggbb", ...] or names of CSS colours after the "=" -> a palette; its order is the labels' order."""
    palette = {}
    for word in words:
        name, _, value = word.partition("=")
        try:
            palette[name] = ImageColor.getrgb(value)[:3]
        except ValueError:
            raise UserError(f"--palette {word}: expected name=#rrggbb, such as purple=#800080") from None
    if len(palette) < max(2, len(words)):
        raise UserError("--palette: expected two or more colours of different names")
    return palette


# of what makes a set of one's own: such a set does not go where the default one is kept
DEFAULTS = {"space": "rgb", "palette": None, "count": 2000, "shares": "balanced", "seed": 0}


def parse():
    parser = argparse.ArgumentParser(description="Sets of images: letters (4.2.1) and paintings (4.2.2).")
    commands = parser.add_subparsers(dest="command", required=True)
    p = commands.add_parser("letters", help="pack a set of letters and report what is in it, or make one from fonts")
    p.add_argument("--data", help="folder of class folders, or .npz with images and labels (default: embedded letters)")
    p.add_argument("--fonts", help="render A to Z of the fonts in this folder instead, to --out")
    p.add_argument("--out", help="folder for the rendered letters, one folder a letter")
    p.add_argument("--sheet", help="write a contact sheet by label, as fig. 4.1, to this file")
    p = commands.add_parser("paintings", help="pack a folder of images with colour labels, or paint one")
    p.add_argument("--data", help="folder of images, nested or flat (default: the embedded painter)")
    p.add_argument("--out", help="folder for the packed set (default: beside --data, or the user's cache)")
    p.add_argument("--size", type=int, default=256, help="pixels a side (default 256)")
    p.add_argument("--space", choices=("rgb", "lab"), help="where the nearest colour is looked for (default rgb)")
    p.add_argument(
        "--palette",
        nargs="+",
        metavar="NAME=#RRGGBB",
        help="the label colours (default: table 4.1, CSS values, from which colour distances are measured all the same)",
    )
    p.add_argument("--count", type=int, help="how many pictures to paint (default 2000)")
    p.add_argument("--shares", choices=("balanced", "table"), help="of the painted labels; table = 4.1's")
    p.add_argument("--seed", type=int, help="of the painted pictures (default 0)")
    p.add_argument("--processes", type=int, help="default: one a core")
    p.add_argument("--sheet", help="write a contact sheet by label, as fig. 4.4, to this file")
    p.add_argument("--each", type=int, default=8, help="images a label on the sheet (default 8)")
    p.set_defaults(**DEFAULTS)
    p = commands.add_parser("relabel", help="compare the RGB and the LAB rule on a set: histograms, transitions, mismatches")
    p.add_argument("--data", help="folder of images, or packed by `paintings` (default: the embedded painter)")
    p.add_argument("--out", default="relabel", help="folder for figure_4_2.png and figure_4_3.png (default relabel)")
    p.add_argument("--size", type=int, help="of images that are not packed yet (default 256)")
    p = commands.add_parser("rows", help="one picture of several folders of images, a row each (fig. 5.8)")
    p.add_argument("rows", nargs="+", metavar="NAME=DIR", help="a row's name, and the folder of its images, nested or flat")
    p.add_argument("--n", type=int, default=8, help="images a row, spread evenly over those of the folder (default 8)")
    p.add_argument("--size", type=int, default=128, help="pixels a side that every image is brought to (default 128)")
    p.add_argument("--out", default="rows.png", help="the picture (default rows.png)")
    return parser.parse_args()


def main():
    args = parse()
    commands = {"letters": letters_command, "paintings": paintings_command, "relabel": relabel_command, "rows": rows_command}
    commands[args.command](args)


def letters_command(args):
    if not args.fonts:
        if args.sheet:
            picture_name(args.sheet)
        letters = open_letters(args.data)
        print(letters.report())
        if args.sheet:
            with whole_file(args.sheet) as temporary:
                contact_sheet(letters, 16, 16, 32).save(temporary)
        return
    if not args.out or args.data or args.sheet:
        raise UserError("--fonts DIR renders to --out DIR, and takes neither --data nor --sheet")
    reasons = letters_from_fonts(args.fonts, args.out)
    kept = reasons.pop("")
    print(f"{args.out}: 26 letters of {kept:,} fonts, {sum(reasons.values()):,} rejected (fonts.csv says which)")
    for reason, count in reasons.most_common():
        print(f"  {count:,} {reason}")


def paintings_command(args):
    if args.size < 8 or args.count < 1 or args.each < 1 or args.seed < 0 or (args.processes or 1) < 1:
        raise UserError("--size must be 8 or more, --count, --each and --processes 1 or more, --seed 0 or more")
    if args.sheet:
        picture_name(args.sheet)
    own = [name for name, default in DEFAULTS.items() if getattr(args, name) != default]
    useless = set(own) & ({"count", "shares", "seed"} if args.data else {"space", "palette"})
    if useless:
        with_data = "with" if args.data else "without"
        raise UserError(f"--{' and --'.join(sorted(useless))}: means nothing {with_data} --data")
    if own and not args.out:
        raise UserError(f"--{own[0]}: such a set needs a folder of its own; name it with --out DIR")
    if not args.out:
        paintings = open_paintings(args.data, args.size)
    elif args.data:
        if not Path(args.data).is_dir():
            raise UserError(f"{args.data}: no such folder")
        palette = palette_of(args.palette) if args.palette else COLOURS
        how = {"space": args.space, "palette": palette, "processes": args.processes}
        paintings = pack_paintings(Path(args.data).resolve(), Path(args.out).resolve(), args.size, **how)
    else:
        paintings = paint_set(Path(args.out).resolve(), args.size, args.count, args.seed, args.shares, args.processes)
    print(paintings.report())
    if args.sheet:
        with whole_file(args.sheet) as temporary:
            contact_sheet(paintings, args.each, min(args.each, 16)).save(temporary)


def relabel_command(args):
    state = packed_state(Path(args.data)) if args.data else None
    state = state or {"size": 256, "palette": COLOURS}
    if "palette" not in state:
        raise UserError(f"{args.data}: its labels are no colours; pack its images with python data.py paintings first")
    palette, paintings = state["palette"], open_paintings(args.data, args.size or state["size"])
    rgb, lab, excess = relabel(paintings, palette)
    print(transition_report(rgb, lab, paintings.classes))
    agree = " and ".join(
        f"{100 * (paintings.labels == labels).mean():.1f} % by {name}" for name, labels in (("RGB", rgb), ("LAB", lab))
    )
    print(f"\nthe set's own labels are those of {agree}")
    rows = [
        {"label": label, "set": name, "share": 100 * (labels == i).mean()}
        for name, labels in (("RGB", rgb), ("LAB", lab))
        for i, label in enumerate(paintings.classes)
    ]
    out = Path(args.out)
    with whole_file(out / "figure_4_3.png") as temporary:
        bars(rows, "share", f"Labels of {len(rgb):,} images, per cent").save(temporary)
    print(f"{out / 'figure_4_3.png'}: both histograms")
    if (rgb != lab).any():
        with whole_file(out / "figure_4_2.png") as temporary:
            worst_mismatches(paintings, rgb, lab, excess).save(temporary)
        print(f"{out / 'figure_4_2.png'}: where the RGB labels fit worst")


def rows_command(args):
    """Figure 5.8: the chosen images of each folder in a row; of more than --n, as many spread evenly over them."""
    if args.n < 1 or args.size < 8:
        raise UserError("--n must be 1 or more, --size 8 or more")
    out, images, names = picture_name(args.out), [], []
    for item in args.rows:
        name, _, folder = item.partition("=")
        if not folder:
            raise UserError(f"{item}: expected NAME=DIR, such as LDM=samples/blue")
        if not Path(folder).is_dir():
            raise UserError(f"{folder}: no such folder; python sample.py --per-label N --out DIR makes one of generated images")
        files = sorted(path / file for path, _, found in walk(Path(folder)) for file in found)
        if not files:
            raise UserError(f"{folder}: no images in it")
        row = np.full((args.n, args.size, args.size, 3), 255, np.uint8)
        for i, k in enumerate(np.linspace(0, len(files) - 1, min(args.n, len(files))).astype(int)):
            row[i] = load_image(files[k], args.size)
        images.append(row)
        names.append(name)
    with whole_file(out) as temporary:
        grid(np.concatenate(images), args.n, names).save(temporary)
    print(f"{out}: {', '.join(names)}, a row each")


if __name__ == "__main__":
    run_program(main)
