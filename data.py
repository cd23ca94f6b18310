"""Images in, pictures out: section 4.2 of the thesis.

    python data.py --data PATH        pack a set of letters (or any folder-per-class tree) and report what is in it

A set of images is packed once into a uint8 memory map; training then reads batches straight from it. The embedded letters
(`assets/letters.png`: 400 fonts x 26 capitals) need no packing and no download.
"""

import argparse
import contextlib
import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, UnidentifiedImageError
from tqdm import tqdm

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


def _remove(path):
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


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
    return values.mean((-3, -2), dtype=np.float64)


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
# Sets of images with labels
# ------------------------------------------------------------------------------------------------------------------


@dataclass
class ImageSet:
    """images (N, H, W, C) uint8, C = 1 or 3, often a memory map; labels (N,); sources (N,): the font an image comes from."""

    images: np.ndarray
    labels: np.ndarray
    sources: np.ndarray
    classes: list[str]

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
        return "\n".join(lines)


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


# ------------------------------------------------------------------------------------------------------------------
# Packing: any tree or npz -> images.npy, labels.npy, sources.npy, set.json
# ------------------------------------------------------------------------------------------------------------------


def open_packed(path, size):
    """The set at `path` as an ImageSet over a memory map, packed beside it first if that was not done or the set changed.

    A folder counts as changed when a file is added to or removed from it, an .npz when its size or date changes.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path}: no such file or folder")
    root = path.resolve() if path.is_file() else class_root(path.resolve())
    state = {"size": size, "files": source_state(root)}
    folder = packed_folder(root, size)
    about = folder / "set.json"
    if not about.exists() or json.loads(about.read_text())["state"] != state:
        pack(root, size, state, folder)
    arrays = [np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("images", "labels", "sources")]
    return ImageSet(*arrays, json.loads(about.read_text())["classes"])


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


def pack(root, size, state, folder):
    """Decode every image once and write the packed set to `folder`, whole or not at all."""
    classes, names, labels, count, images = read_npz(root) if root.is_file() else read_tree(root)
    check_alphabet(root, classes)
    with whole_file(folder) as temporary:
        temporary.mkdir()
        # written in order, not through a map: a full disk is then an error that can be reported
        with (temporary / "images.npy").open("wb") as file:
            for i, image in enumerate(tqdm(images(size), f"packing {root.name}", count, unit="image", disable=None)):
                if i == 0:
                    header = {"descr": "|u1", "fortran_order": False, "shape": (count, *image.shape)}
                    np.lib.format.write_array_header_1_0(file, header)
                file.write(image.tobytes())
        np.save(temporary / "labels.npy", np.asarray(labels, np.int64))
        np.save(temporary / "sources.npy", sources_of(names, labels))
        (temporary / "set.json").write_text(json.dumps({"classes": classes, "state": state}))
        if folder.exists():
            shutil.rmtree(folder)


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


def read_tree(root):
    """A folder of class folders -> (classes, file names, labels, count, function size -> iterator of arrays)."""
    classes, files, labels, firsts = [], [], [], []
    for folder in subfolders(root):
        inside = sorted(file for file in folder.iterdir() if is_image(file))
        if not inside:
            raise UserError(f"{folder}: no images in it (expected {', '.join(sorted(IMAGE_SUFFIXES))}); remove the folder")
        labels += [len(classes)] * len(inside)
        classes.append(folder.name)
        files += inside
        firsts.append(inside[0])
    mode = "L" if all(open_image(file).mode in ("1", "L", "LA", "I;16") for file in firsts) else "RGB"

    def images(size):
        tasks = ((file, size, mode) for file in files)
        if len(files) < 2000:  # starting processes would take longer
            yield from map(_load, tasks)
            return
        with multiprocessing.get_context("spawn").Pool(initializer=_ignore_interrupts) as pool:
            yield from pool.imap(_load, tasks, chunksize=256)

    return classes, [file.stem for file in files], labels, len(files), images


def _ignore_interrupts():  # Ctrl-C is the parent's to handle
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _load(task):
    file, size, mode = task
    return load_image(file, size, mode)


def open_image(file):
    try:
        return Image.open(file)
    except (UnidentifiedImageError, OSError, Image.DecompressionBombError) as error:
        raise UserError(f"{file}: not an image that can be read; remove it or replace it") from error


def load_image(file, size, mode="RGB"):
    """One image, cropped to the centre square and resized: (size, size, C) uint8, C = 1 for mode "L", 3 for "RGB"."""
    try:
        image = crop_and_resize(open_image(file).convert(mode), size)
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"{file}: not an image that can be read ({error}); remove it or replace it") from error
    return np.asarray(image).reshape(size, size, -1)


def read_npz(path):
    """An .npz with `images` (N, H, W) or (N, H, W, C) uint8 and `labels` (N,), as `read_tree` returns it."""
    try:
        with np.load(path, allow_pickle=False) as file:
            missing = {"images", "labels"} - set(file.files)
            if missing:
                raise UserError(f"{path}: no array {' and '.join(sorted(missing))}; it holds: {', '.join(file.files)}")
            array, labels = file["images"], file["labels"]
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, AttributeError, TypeError) as error:
        raise UserError(f"{path}: not an .npz file that can be read") from error
    images_fit = array.dtype == np.uint8 and (array.ndim == 3 or array.ndim == 4 and array.shape[-1] in (1, 3)) and len(array)
    if not images_fit or labels.shape != array.shape[:1] or labels.dtype.kind not in "iuU":
        found = f"images {array.dtype} {array.shape} and labels {labels.dtype} {labels.shape}"
        raise UserError(f"{path}: expected uint8 images (N, H, W), (N, H, W, 1 or 3) and N labels, found {found}")
    values, numbers = np.unique(labels, return_inverse=True)
    classes = [str(value) for value in values]
    if np.issubdtype(labels.dtype, np.integer):
        if values.min() < 0 or values.max() > 25:
            raise UserError(f"{path}: labels from {values.min()} to {values.max()}; expected 0 to 25 for A to Z")
        classes = [ALPHABET[value] for value in values]
    array = array.reshape(*array.shape[:3], -1)

    def images(size):
        for image in array:
            same = image.shape[:2] == (size, size)
            yield (
                image if same else np.asarray(crop_and_resize(Image.fromarray(image.squeeze()), size)).reshape(size, size, -1)
            )

    return classes, None, numbers, len(array), images


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
        text = font(max(11, height // 3))
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


def chart(lines, title, x_label, y_label, size=(900, 460)):
    """A line chart with a logarithmic y axis.

    lines: name -> list of pieces, a piece being (xs, ys); pieces of a line are not joined, so an interruption shows as a gap.
    """
    s = 2  # drawn at twice the size and reduced, for smooth lines
    width, height = size[0] * s, size[1] * s
    left, right, top, bottom = 74 * s, width - 20 * s, 44 * s, height - 52 * s
    picture = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(picture)
    pieces = [(np.asarray(xs, float), np.asarray(ys, float)) for line in lines.values() for xs, ys in line if len(xs)]
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


def main():
    parser = argparse.ArgumentParser(description="Pack a set of letters and report what is in it.")
    parser.add_argument("--data", help="folder of class folders, or .npz with images and labels (default: embedded letters)")
    print(open_letters(parser.parse_args().data).report())


if __name__ == "__main__":
    run_program(main)
