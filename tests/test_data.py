"""Section 4.2: colours and labels, decoding, packing, the split; the files of all programs."""

import json
import os
import struct
import subprocess
import sys
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import data
import painter
from data import (
    ALPHABET,
    COLOURS,
    TABLE_4_1,
    UserError,
    balanced_rows_of_update,
    convolution_seconds,
    crop_and_resize,
    decode,
    is_plain,
    mean_colour,
    nearest_colour,
    open_set,
    pack_folder,
    rgb_to_lab,
    rows_of_update,
    to_tensor,
    to_uint8,
    validation_images,
    view,
    whole_file,
)

NAMES = list(COLOURS)

# ------------------------------------------------------------------------------------------ colours

# Published CIE-LAB values (D65, 2 degrees; brucelindbloom.com's calculator)
ANCHORS = {
    (0, 0, 0): (0, 0, 0),
    (255, 255, 255): (100, 0, 0),
    (255, 0, 0): (53.2408, 80.0925, 67.2032),
    (0, 255, 0): (87.7347, -86.1827, 83.1793),
    (0, 0, 255): (32.2970, 79.1875, -107.8602),
    (0, 255, 255): (91.1132, -48.0875, -14.1312),
    (255, 0, 255): (60.3242, 98.2343, -60.8249),
    (255, 255, 0): (97.1393, -21.5537, 94.4780),
    (128, 128, 128): (53.5850, 0, 0),
}


def test_lab_of_published_anchors():
    """E64: the corners of sRGB, and the scales of the two spaces."""
    colours, lab = np.array(list(ANCHORS)), np.array(list(ANCHORS.values()))
    assert np.abs(rgb_to_lab(colours) - lab).max() < 1e-4
    assert np.abs(rgb_to_lab(colours.astype(np.uint8)) - lab).max() < 2e-4
    apart = np.linalg.norm(lab[:8, None] - lab[:8], axis=-1)
    assert apart[0, 1] == 100 and abs(apart.max() - 258.7) < 0.05  # black to white: 441.7 in RGB


def lab_by_hand(pixel):
    """CIE-LAB of one pixel from the textbook's formulas, which share nothing with data.py."""
    linear = [
        v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4
        for v in (c / 255 for c in pixel)
    ]
    matrix = [
        (0.4124564, 0.3575761, 0.1804375),
        (0.2126729, 0.7151522, 0.0721750),
        (0.0193339, 0.1191920, 0.9503041),
    ]
    xyz = [
        sum(m * v for m, v in zip(row, linear)) / white
        for row, white in zip(matrix, (0.95047, 1.0, 1.08883))
    ]
    fx, fy, fz = (t ** (1 / 3) if t > 216 / 24389 else (24389 / 27 * t + 16) / 116 for t in xyz)
    return 116 * fy - 16, 500 * (fx - fy), 200 * (fy - fz)


def test_lab_of_any_pixel_by_hand():
    pixels = np.random.default_rng(0).integers(0, 256, (9, 50, 3), np.uint8)
    assert rgb_to_lab(pixels).dtype == rgb_to_lab(pixels.astype(np.float32)).dtype == np.float32
    expected = np.array([[lab_by_hand(pixel) for pixel in row] for row in pixels.tolist()])
    assert np.abs(rgb_to_lab(pixels.astype(float)) - expected).max() < 1e-3
    assert np.abs(rgb_to_lab(pixels) - expected).max() < 2e-3


def test_table_4_1_labels_in_its_order():
    assert NAMES == ["orange", "green", "blue", "purple", "yellow", "red", "black", "white"]
    colours = np.array(list(COLOURS.values()))
    assert nearest_colour(colours).tolist() == list(range(8))
    assert nearest_colour(rgb_to_lab(colours), "lab").tolist() == list(range(8))


def test_nearest_colour_against_a_plain_loop():
    """E39: to LAB first, then the mean, with sRGB's gamma and white D65."""
    images = np.random.default_rng(0).integers(0, 256, (40, 5, 4, 3), np.uint8)
    images[:20] //= 3
    for space, convert in (("rgb", lambda pixel: pixel), ("lab", lab_by_hand)):
        expected = []
        for image in images.tolist():
            pixels = [convert(pixel) for row in image for pixel in row]
            mean = [sum(values) / len(pixels) for values in zip(*pixels)]
            apart = [sum((m - v) ** 2 for m, v in zip(mean, convert(c))) for c in COLOURS.values()]
            expected.append(apart.index(min(apart)))
        assert nearest_colour(mean_colour(images, space), space).tolist() == expected
    half = np.array([[[0, 0, 0], [255, 255, 255]]], np.uint8)
    assert mean_colour(half, "lab")[0] == pytest.approx(50, abs=1e-3)  # the mean RGB has L = 53.4


def test_greys_are_purple_in_rgb():
    """E38: fig. 4.2's mismatch is due to the rule: greys 65 to 159 are nearest to purple in RGB."""
    greys = np.arange(256)[:, None].repeat(3, 1)
    names = np.array(NAMES)[nearest_colour(greys)]
    assert (names[:64] == "black").all() and (names[65:160] == "purple").all()
    assert (names[160:] == "white").all()
    assert names[64] == "green"  # equally near to black, green and purple: the first of the table
    in_lab = np.array(NAMES)[nearest_colour(rgb_to_lab(greys), "lab")]
    assert (in_lab[:119] == "black").all() and (in_lab[119:] == "white").all()
    assert NAMES[nearest_colour([120, 110, 90])] == "purple"  # a muted brown


def test_plain_images_survive_nothing_that_a_camera_adds():
    random, size = np.random.default_rng(0), 256
    y, x = np.mgrid[-1 : 1 : size * 1j, -1 : 1 : size * 1j]
    for colour in ((30, 60, 200), (128, 0, 128), (240, 240, 235), (25, 25, 25)):
        flat = np.full((size, size, 3), colour, float)
        signed = flat.copy()
        signed[225:245, 190:245] = (0, 0, 0) if sum(colour) > 300 else (255, 255, 255)  # 1.7 %
        cases = {
            "flat": flat,
            "noise": flat + random.normal(0, 12, flat.shape),
            "vignette": flat * (1 - 0.12 * (x**2 + y**2))[..., None],
            "canvas": flat + 12 * (np.sin(60 * x) * np.sin(60 * y))[..., None],
            "signature": signed,
            "all": signed * (1 - 0.04 * (x**2 + y**2))[..., None] + random.normal(0, 8, flat.shape),
        }
        for name, case in cases.items():
            assert is_plain(np.clip(case, 0, 255).astype(np.uint8)), (name, colour)
        square = flat.copy()
        square[80:160, 80:160] = 255 - flat[80:160, 80:160]  # a tenth in another colour
        gradient = flat + 60 * x[..., None] * (1 if sum(colour) < 600 else -1)
        for picture in (square, gradient):
            assert not is_plain(np.clip(picture, 0, 255).astype(np.uint8)), colour


# ---------------------------------------------------------------------------------- 4.2.3, decoding


def test_values_become_minus_one_to_one_and_back_exactly():
    values = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1)
    x = to_tensor(values)
    assert x.shape == (1, 3, 16, 16) and x.dtype == torch.float32
    assert x.min() == -1 and x.max() == 1
    assert torch.equal(x[:, 0], x[:, 1]) and torch.equal(x[:, 0], x[:, 2])  # grey in RGB (4.2.1)
    assert np.array_equal(to_uint8(x), values.repeat(3, axis=3))
    colour = np.random.default_rng(0).integers(0, 256, (2, 4, 4, 3), np.uint8)
    assert np.array_equal(to_uint8(to_tensor(colour)), colour)
    assert to_uint8(torch.tensor([-3.0, 3.0]).view(1, 1, 1, 2)).flatten().tolist() == [0, 255]


def test_the_eight_views_are_the_symmetries_of_a_square():
    x = torch.arange(9.0).view(3, 3)
    views = [view(x, k) for k in range(8)]
    assert torch.equal(views[0], x) and torch.equal(views[1], x.flip(1))
    wanted = {
        tuple(one.flatten().tolist())
        for m in (x, x.T)
        for one in (m, m.flip(0), m.flip(1), m.flip(0, 1))
    }
    assert {tuple(one.flatten().tolist()) for one in views} == wanted and len(wanted) == 8


def test_crop_comes_before_resize_so_nothing_is_deformed():
    wide = np.zeros((40, 100, 3), np.uint8)
    wide[:, 30:70] = (0, 255, 0)  # exactly the centre square
    wide[10:30, 40:60] = (255, 0, 0)  # a square inside it
    small = np.asarray(crop_and_resize(Image.fromarray(wide), 20))
    assert small.shape == (20, 20, 3)
    red = small[..., 0] > 127
    assert red.any(0).sum() == red.any(1).sum() == 10  # still square
    assert np.all(small.astype(int).sum(-1) > 200)  # nothing from outside the crop
    turned = np.asarray(crop_and_resize(Image.fromarray(wide.transpose(1, 0, 2)), 20))
    assert np.abs(turned.transpose(1, 0, 2).astype(int) - small).max() < 8  # Pillow rounds twice


def test_the_crop_is_the_centre_square_of_odd_sizes_too():
    """Without a resize the pixels are those of the box; odd rests are cut at the right or below."""
    for width, height in ((7, 4), (4, 7), (8, 5), (5, 5), (1, 6), (31, 12)):
        values = np.arange(width * height * 3, dtype=np.uint32)
        pixels = values.astype(np.uint8).reshape(height, width, 3)
        side = min(width, height)
        left, top = [(rest - rest % 2) // 2 for rest in (width - side, height - side)]
        cropped = np.asarray(crop_and_resize(Image.fromarray(pixels), side))
        assert np.array_equal(cropped, pixels[top : top + side, left : left + side])


def lanczos_by_hand(pixels, size):
    """A square reduced along x, then y, by sinc(t) sinc(t / 3), |t| < 3; rounded after each."""
    factor = len(pixels) / size
    centres = (np.arange(size) + 0.5) * factor - 0.5
    t = (np.arange(len(pixels)) - centres[:, None]) / factor
    weights = np.where(np.abs(t) < 3, np.sinc(t) * np.sinc(t / 3), 0)
    weights /= weights.sum(1, keepdims=True)
    along_x = np.einsum("ij,yjc->yic", weights, pixels.astype(float))
    along_x = np.clip(np.floor(along_x + 0.5), 0, 255)
    return np.clip(np.floor(np.einsum("ij,jxc->ixc", weights, along_x) + 0.5), 0, 255)


def test_the_resize_against_plain_numpy():
    """It is anti-aliased, too: fine stripes become a grey and no pattern of their own."""
    random = np.random.default_rng(0)
    for side, size in ((64, 16), (90, 32), (37, 12)):
        pixels = random.integers(0, 256, (side, side, 3), np.uint8)
        small, by_hand = (
            np.asarray(crop_and_resize(Image.fromarray(pixels), size)),
            lanczos_by_hand(pixels, size),
        )
        assert np.abs(small.astype(int) - by_hand).max() <= 1  # Pillow's weights have 22 bits
        assert (small == by_hand).mean() > 0.999
    stripes = np.zeros((64, 64), np.uint8)
    stripes[:, ::2] = 255
    small = np.asarray(crop_and_resize(Image.fromarray(stripes), 16))
    assert np.abs(small[:, 2:-2].astype(int) - 127).max() < 20


TEAL, ROSE = (20, 120, 110), (220, 150, 160)


def halves(size=(64, 64), left=TEAL, right=ROSE, mode="RGB"):
    """A picture of two colours, left and right: we know how it looks, and it is not plain."""
    image = Image.new("RGB", size, left)
    image.paste(right, (size[0] // 2, 0, *size))
    return image.convert(mode)


def looks_like(image, left=TEAL, right=ROSE, tolerance=2):
    pixels = image.astype(int)
    assert pixels.shape == (32, 32, 3)
    near = (np.abs(pixels[:, 3:13] - left), np.abs(pixels[:, 19:29] - right))
    return max(part.max() for part in near) <= tolerance


def png_of(path, width, height):
    """The header of a PNG of that size, and no pixels."""
    size = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", size), (b"IDAT", zlib.compress(b"")), (b"IEND", b"")]
    parts = (
        struct.pack(">I", len(c)) + k + c + struct.pack(">I", zlib.crc32(k + c)) for k, c in chunks
    )
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))


def test_images_of_every_odd_kind_come_out_as_they_look(tmp_path):
    def saved(image, name, **how):
        image.save(tmp_path / name, **how)
        return decode(tmp_path / name, 32)

    black, white = (0,) * 3, (255,) * 3
    assert looks_like(saved(halves(), "plain.png"), tolerance=0)
    assert looks_like(saved(halves(mode="CMYK"), "cmyk.jpg", quality=95), tolerance=6)
    assert looks_like(saved(halves(mode="CMYK"), "cmyk.tif"))
    assert looks_like(saved(halves().quantize(8), "palette.png"))
    grey = [(round(np.dot(c, (0.299, 0.587, 0.114))),) * 3 for c in (TEAL, ROSE)]
    assert looks_like(saved(halves(mode="L"), "grey.png"), *grey)
    assert looks_like(saved(halves(mode="LA"), "grey_alpha.png"), *grey)
    assert looks_like(saved(halves(left=black, right=white, mode="1"), "bits.png"), black, white)
    deep = np.repeat(np.array([[100 * 257] * 32 + [200 * 257] * 32], np.uint16), 64, 0)
    for name in ("deep.png", "deep.tif"):  # 16 bits: scaled, not clipped to white
        assert looks_like(saved(Image.fromarray(deep), name), (100,) * 3, (200,) * 3)

    clear = halves(mode="RGBA")
    clear.paste((10, 200, 30, 0), (0, 0, 32, 64))  # transparent: the paper shows
    assert looks_like(saved(clear, "clear.png"), white, ROSE)
    assert looks_like(saved(clear, "clear.webp", lossless=True), white, ROSE)
    indexed = halves().quantize(8)
    index = indexed.getpixel((0, 0))
    assert looks_like(saved(indexed, "indexed.png", transparency=index), white, ROSE)

    turned, exif = halves().rotate(90, expand=True), Image.Exif()
    exif[0x0112] = 6  # what a camera held upright stores: turn clockwise to view
    assert looks_like(saved(turned, "turned.jpg", exif=exif, quality=95), tolerance=6)
    assert looks_like(saved(turned.convert("RGBA"), "turned.png", exif=exif), tolerance=0)
    turned_deep = Image.fromarray(np.rot90(deep).copy())
    assert looks_like(saved(turned_deep, "turned_deep.png", exif=exif), (100,) * 3, (200,) * 3)
    broken = (tmp_path / "turned.jpg").read_bytes().replace(b"MM\x00*", b"MM\x00!")
    (tmp_path / "odd_exif.jpg").write_bytes(broken.replace(b"II*\x00", b"II!\x00"))
    assert decode(tmp_path / "odd_exif.jpg", 32).shape == (32, 32, 3)  # nonsense beside the picture
    pages = saved(halves(), "pages.tif", save_all=True, append_images=[halves(left=ROSE)])
    assert looks_like(pages, tolerance=0)  # the first page
    assert looks_like(saved(halves((2400, 2400)), "square.jpg", quality=95), tolerance=6)


def write_rejected(folder):
    """file -> how the reason for rejecting it begins."""
    halves((600, 400)).save(folder / "whole.jpg")
    (folder / "truncated.jpg").write_bytes((folder / "whole.jpg").read_bytes()[:3000])
    (folder / "whole.jpg").unlink()
    (folder / "text.png").write_text("this is not an image")
    (folder / "empty.jpg").touch()
    halves().save(folder / "pixels.png")
    damaged = bytearray((folder / "pixels.png").read_bytes())
    damaged[60:90] = bytes(30)
    (folder / "pixels.png").write_bytes(damaged)
    for name in ("moving.gif", "moving.png", "moving.webp"):
        halves().save(folder / name, save_all=True, append_images=[halves(left=ROSE, right=TEAL)])
    png_of(folder / "bomb.png", 50_000, 50_000)
    noise = np.random.default_rng(0).normal(size=(40, 40)).astype(np.float32)
    Image.fromarray(noise).save(folder / "float.tif")
    Image.fromarray(np.full((40, 40), 1_000_000, np.int32)).save(folder / "integer.tif")
    Image.new("RGB", (50, 50), TEAL).save(folder / "flat.png")
    Image.new("RGBA", (50, 50), (200, 10, 10, 0)).save(folder / "invisible.png")
    (folder / "lost.png").symlink_to("nowhere.png")
    reasons = {
        "truncated.jpg": "damaged: ",
        "text.png": "not an image",
        "empty.jpg": "not an image",
    }
    reasons |= {"pixels.png": "damaged: ", "bomb.png": "too large", "float.tif": "32-bit pixels"}
    reasons |= {f"moving.{suffix}": "animated: 2 frames" for suffix in ("gif", "png", "webp")}
    reasons |= {"integer.tif": "32-bit pixels", "flat.png": "plain", "invisible.png": "plain"}
    return reasons | {"lost.png": "No such file"}


def about(folder):
    return json.loads((folder / "set.json").read_text())


def test_bad_files_are_left_out_with_a_reason_and_stop_nothing(tmp_path):
    root = tmp_path / "set"
    (root / "style").mkdir(parents=True)
    reasons = write_rejected(root / "style")
    for name in ("a.png", "z.png"):
        halves().save(root / name)
    paintings = open_set(root, 32, "rgb")
    rejected = about(tmp_path / "set.packed32")["rejected"]
    assert len(paintings.images) == 2 and rejected.keys() == {f"style/{name}" for name in reasons}
    for name, reason in reasons.items():
        assert rejected[f"style/{name}"].startswith(reason), (name, rejected[f"style/{name}"])
    report = paintings.report()
    assert "13 of 15 files left out: 3 animated, " in report and "2 damaged" in report


# ------------------------------------------------------------------------------------------ packing


def write_paintings(root, count=24, size=(48, 40), seed=0):
    """Pictures of every kind of colour in nested folders; returns file -> its pixels."""
    random, pixels = np.random.default_rng(seed), {}
    for i in range(count):
        file = (
            Path(("Action_painting", "Color_Field_Painting/large", ".")[i % 3]) / f"artist_{i}.png"
        )
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        base = random.integers(0, 2, 3) * random.integers(100, 256)
        image = np.clip(base + random.normal(0, 40, (size[1], size[0], 3)), 0, 255).astype(np.uint8)
        pixels[file.as_posix()] = image
        Image.fromarray(image).save(root / file)
    return pixels


@pytest.mark.parametrize("space", ["rgb", "lab"])
def test_packed_labels_and_pixels_against_a_plain_loop(tmp_path, space):
    pixels = write_paintings(tmp_path / "wikiart", size=(48, 40))
    paintings = pack_folder(tmp_path / "wikiart", tmp_path / "out", 40, space)
    assert isinstance(paintings.images, np.memmap) and paintings.classes == NAMES
    counts = Counter()
    for row, file in enumerate(sorted(pixels, key=Path)):
        crop = pixels[file][:, 4:44]  # the centre of 48 x 40; at this size nothing is resized
        assert np.array_equal(paintings.images[row], crop)
        convert = lab_by_hand if space == "lab" else np.array
        mean = np.mean([convert(p) for p in crop.reshape(-1, 3).tolist()], 0)
        apart = [sum((mean - convert(c)) ** 2) for c in COLOURS.values()]
        assert paintings.labels[row] == np.argmin(apart)
        counts[NAMES[np.argmin(apart)]] += 1
    assert len(counts) > 3
    assert all(f"{name} {count}" in paintings.report() for name, count in counts.items())


def test_a_set_is_packed_once_and_again_when_it_changed(tmp_path, monkeypatch):
    write_paintings(tmp_path / "set", 6)
    first = open_set(tmp_path / "set", 16, "rgb")
    with monkeypatch.context() as patch:
        patch.setattr(data, "pack", None)
        assert np.array_equal(open_set(tmp_path / "set", 16, "rgb").images, first.images)
        assert np.array_equal(open_set(tmp_path / "set.packed16", 16).labels, first.labels)
        with pytest.raises(UserError, match="with 16 pixels per side, not 32"):
            open_set(tmp_path / "set.packed16", 32)
    halves().save(tmp_path / "set" / "Color_Field_Painting" / "large" / "new.png")
    assert len(open_set(tmp_path / "set", 16, "rgb").images) == 7
    table = "file,source\nartist_0.png,a\nartist_1.png,a\nartist_2.png,a\nartist_3.png\n"
    (tmp_path / "set" / "SOURCES.csv").write_text(table)
    assert len(np.unique(open_set(tmp_path / "set", 16, "rgb").sources)) == 5  # three are one now
    (tmp_path / "set" / "SOURCES.csv").write_text("name,painter\na,b\n")
    with pytest.raises(UserError, match="columns file, source"):
        open_set(tmp_path / "set", 16, "rgb")


def test_read_only_folders_are_packed_into_the_cache(tmp_path, monkeypatch):
    write_paintings(tmp_path / "set", 3)
    cache = tmp_path / "cache"
    monkeypatch.setattr(data.os, "access", lambda path, mode: path.is_relative_to(cache))
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    assert len(open_set(tmp_path / "set", 16, "rgb").images) == 3
    assert not list(tmp_path.glob("set.packed*")) and list((tmp_path / "cache").rglob("images.npy"))


def test_links_and_hidden_folders_add_no_image(tmp_path):
    write_paintings(tmp_path / "set", 6)
    (tmp_path / "set" / "Action_painting" / "up").symlink_to(tmp_path / "set")
    for name in ("elsewhere", "set/.hidden", "set/__MACOSX"):
        (tmp_path / name).mkdir()
        halves().save(tmp_path / name / "linked.png")
    (tmp_path / "set" / "linked").symlink_to(tmp_path / "elsewhere")
    assert len(open_set(tmp_path / "set", 16, "rgb").images) == 7


def test_folders_named_after_colours_keep_their_labels_in_the_order_of_the_table(tmp_path):
    """E40: sorted by name, black would be 0 and yellow 7."""
    for name in ("Yellow", "black", "WHITE", "orange"):
        (tmp_path / "set" / name).mkdir(parents=True)
        halves().save(tmp_path / "set" / name / "a.png")  # one picture: the folder decides
    by_colour = open_set(tmp_path / "set", 32, "rgb")
    assert by_colour.classes == NAMES and by_colour.labels.tolist() == [7, 4, 6, 0]  # by file
    by_folder = open_set(tmp_path / "set", 32, pack=False)
    assert by_folder.classes == ["orange", "yellow", "black", "white"]


def test_any_labels_are_labels(tmp_path):
    """Folders A, B, C are three classes; numbers in an .npz keep their names (A4)."""
    for name in ("B", "A", "C"):
        (tmp_path / "set" / name).mkdir(parents=True)
        for i, colour in enumerate((TEAL, ROSE)):
            halves(left=colour).save(tmp_path / "set" / name / f"{i}.png")
    letters = open_set(tmp_path / "set", 32)
    assert letters.classes == ["A", "B", "C"] and letters.labels.tolist() == [0, 0, 1, 1, 2, 2]
    images = np.random.default_rng(0).integers(0, 256, (22, 28, 28), np.uint8)
    np.savez(tmp_path / "mnist.npz", images=images, labels=np.tile(np.arange(11), 2))
    mnist = open_set(tmp_path / "mnist.npz", 32)
    assert mnist.classes == [str(i) for i in range(11)] and mnist.images.shape == (
        22,
        32,
        32,
        3,
    )
    same = open_set(tmp_path / "mnist.npz", 28)
    assert np.array_equal(same.images[..., 0], images)
    assert same.sources.tolist() == [0] * 11 + [1] * 11  # the k-th image of every class


def test_the_kaggle_tree_and_one_decoder(tmp_path):
    """The letters of one font share a file name. Packed or not, the pixels are the same (B2)."""
    root, random = tmp_path / "archive" / "Images" / "Images", np.random.default_rng(0)
    for name in ALPHABET:
        (root / name).mkdir(parents=True)
        for i in range(3):
            pixels = random.integers(0, 256, (300, 300, 3), np.uint8)
            Image.fromarray(pixels).save(root / name / f"{i}.jpg")
    packed = open_set(tmp_path / "archive", 32)
    assert packed.images.shape == (78, 32, 32, 3) and packed.classes == ALPHABET
    assert packed.sources.tolist() == [0, 1, 2] * 26
    files = open_set(tmp_path / "archive", 32, pack=False)
    read = list(files.each(32, lambda row, image: row, "archive"))
    assert [row for row, _, value in read if row == value] == list(range(78))
    assert all(np.array_equal(image, packed.images[row]) for row, image, _ in read)
    assert np.array_equal(files.labels, packed.labels) and files.classes == packed.classes


def test_opening_reads_no_images(tmp_path):
    """A packed set is a memory map: 400,000 images open at once (this file is mostly a hole)."""
    folder = tmp_path / "big"
    folder.mkdir()
    labels = (np.arange(400_000) % 26).tolist()
    content = {"labels": labels, "sources": labels, "classes": ALPHABET, "note": "", "state": {}}
    (folder / "set.json").write_text(json.dumps(content))
    with open(folder / "images.npy", "wb") as file:
        header = {"descr": "|u1", "fortran_order": False, "shape": (400_000, 32, 32, 1)}
        np.lib.format.write_array_header_1_0(file, header)
        file.truncate(file.tell() + 400_000 * 1024)
    big = open_set(folder, 32)
    x, y = big.batch(np.array([399_999, 5]))
    assert isinstance(big.images, np.memmap) and (x == -1).all() and y.tolist() == [399_999 % 26, 5]
    assert os.stat(folder / "images.npy").st_blocks * 512 < 1_000_000


def test_what_is_not_a_set_is_one_clear_line_and_nothing_is_overwritten(tmp_path, refused):
    write_paintings(tmp_path / "set", 4)
    for name in ("hollow", "flat", "mine", "mixed/a"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("flat/a.png", "mixed/b.png", "mixed/a/c.png"):
        Image.new("RGB", (30, 30), TEAL).save(tmp_path / name)
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    image, label = np.zeros((26, 32, 32), np.uint8), np.arange(26)
    np.savez(tmp_path / "keys.npz", pictures=image, labels=label)
    np.savez(tmp_path / "short.npz", images=image[:25], labels=label)
    np.savez(tmp_path / "float.npz", images=image / 1.0, labels=label)
    (tmp_path / "text.npz").write_text("not an archive")
    before = sorted(tmp_path.rglob("*"))
    for name, words in {
        "nowhere": "no such file or folder",
        "hollow": "no images in it",
        "mixed": "what are the classes?",
        "keys.npz": "no array `images`; it holds pictures, labels",
        "short.npz": "expected uint8 images",
        "float.npz": "expected uint8 images",
        "text.npz": "not an .npz file",
    }.items():
        assert words in refused("data", "letters", "--data", tmp_path / name), name
    out, root = tmp_path / "out", tmp_path / "set"

    def error(*words):
        return refused("data", "paintings", *words)

    assert "no such folder" in error("--data", tmp_path / "nowhere")
    assert "left out: 1 plain" in error("--data", tmp_path / "flat", "--out", out)
    assert "holds something else" in error("--data", root, "--out", tmp_path / "mine")
    assert "lies within --data" in error("--data", root, "--out", root / "packed")
    assert "Not a directory" in error(
        "--data", root, "--out", tmp_path / "mine" / "thesis.txt" / "x"
    )
    assert sorted(tmp_path.rglob("*")) == before
    pack_folder(root, out, 16, "rgb")
    kept = (out / "images.npy").read_bytes()
    assert "holds something else" in error("--data", root, "--out", out, "--size", 32)
    assert (out / "images.npy").read_bytes() == kept
    (out / "images.npy").write_bytes(b"")
    with pytest.raises(UserError, match="a damaged packed set"):
        open_set(out)


def test_the_same_images_have_one_fingerprint_wherever_they_are(tmp_path):
    pixels = write_paintings(tmp_path / "a", 8)
    write_paintings(tmp_path / "b" / "moved", 8)
    one, two = (open_set(tmp_path / name, 16, "rgb") for name in ("a", "b/moved"))
    assert one.fingerprint() == two.fingerprint() == open_set(tmp_path / "a.packed16").fingerprint()
    changed = 255 - pixels["artist_2.png"]
    Image.fromarray(changed).save(tmp_path / "b" / "moved" / "artist_2.png")
    os.utime(tmp_path / "b" / "moved", ns=(1, 1))
    assert open_set(tmp_path / "b" / "moved", 16, "rgb").fingerprint() != one.fingerprint()


# ----------------------------------------------------------------------------------- built-in sets


def test_embedded_letters():
    letters = open_set("letters", 32)
    assert letters.images.shape == (10_400, 32, 32, 1) and letters.classes == ALPHABET
    assert np.bincount(letters.labels).tolist() == [400] * 26
    assert set(np.unique(letters.images)) == set(range(0, 256, 17))  # 16 grey levels
    assert (letters.images[:, [0, -1]] == 0).mean() > 0.9  # white on black
    train, validation = letters.split()
    assert len(validation) == 40 * 26 and letters.sources[validation].min() == 360  # 40 fonts
    assert set(letters.sources[train]).isdisjoint(letters.sources[validation])
    credits = (data.ASSETS / "letters_fonts.csv").read_text().splitlines()
    assert len(credits) == 401  # one font per row
    x, y = letters.batch(np.array([0, 27]))
    assert y.tolist() == [0, 1] and torch.equal(x[1], to_tensor(letters.images[27:28])[0])
    part = open_set("letters:validation")
    assert np.array_equal(part.images, letters.images[validation]) and len(part.labels) == 1040


def test_the_default_set_is_painted_once_and_balanced(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    small = data.paint_set
    monkeypatch.setattr(
        data, "paint_set", lambda folder, size, **how: small(folder, size, 24, **how)
    )
    paintings = open_set("paintings", 32)
    assert np.bincount(paintings.labels).tolist() == [3] * 8
    assert "painted by the project" in paintings.report()
    monkeypatch.setattr(data, "paint", None)
    assert np.array_equal(open_set("paintings", 32).images, paintings.images)


def test_the_shares_of_table_4_1(tmp_path, monkeypatch):
    flat = lambda seed, label, size: np.full((size, size, 3), label, np.uint8)  # noqa: E731
    monkeypatch.setattr(data, "paint", flat)
    paintings = data.paint_set(tmp_path / "table", 8, 19_774 // 4, shares="table")
    counts = np.bincount(paintings.labels)
    assert np.abs(counts - np.array(TABLE_4_1) / 4).max() <= 1 and counts.sum() == 19_774 // 4
    assert (paintings.images[:, 0, 0, 0] == paintings.labels).all()


def test_both_types_are_timed_with_one_thread(monkeypatch):
    threads, used = torch.get_num_threads(), set()
    monkeypatch.setattr(
        data.timeit,
        "timeit",
        lambda work, number: used.add((work().dtype, torch.get_num_threads())) or 1.0,
    )
    assert convolution_seconds() == [1.0, 1.0] and torch.get_num_threads() == threads
    assert used == {(torch.float32, 1), (torch.bfloat16, 1)}


def test_evenly_spaced_rows():
    assert data.evenly(11, 3).tolist() == [0, 5, 10] and data.evenly(2, 5).tolist() == [0, 1]


def test_every_second_picture_has_any_colour(tmp_path):
    paintings = data.paint_set(tmp_path / "set", 32, 128, shares="palettes")
    means = mean_colour(paintings.images)
    assert np.array_equal(paintings.labels[1::2], nearest_colour(means[1::2]))
    _, a, b = data.rgb_to_lab(means).T
    hues = np.degrees(np.arctan2(b, a)) % 360 // 45
    assert (np.bincount(hues[1::2].astype(int), minlength=8) > 0).all()
    turquoise = (hues == 4) & (np.hypot(a, b) > 10)  # far from all label colours
    assert turquoise[1::2].any() and not turquoise[0::2].any()


def test_pictures_for_palettes_have_one_to_three_main_colours(monkeypatch):
    painted = []
    monkeypatch.setattr(painter, "paint", lambda rng, size, colours, *_: painted.append(colours))
    for seed in range(60):
        data.paint_any(seed)
    counts = np.bincount([len(colours) for colours in painted], minlength=5)
    assert counts[0] == counts[4] == 0 and counts[1:4].min() > 10


# ------------------------------------------------------------------------------------ split, rows


def test_split_is_five_per_cent_of_every_label_and_seeded():
    """E68: 5.2 shows a validation loss and describes no split; this is ours."""
    labels = np.repeat(np.arange(8), TABLE_4_1)
    assert len(labels) == 19_774  # E36: "19k" in 4.2.2
    assert TABLE_4_1[4] == 142 != 147  # E36: yellow, in the table and in 5.4
    sources = np.arange(len(labels))
    validates = validation_images(labels, sources)
    assert np.array_equal(np.bincount(labels[validates]), np.rint(0.05 * np.array(TABLE_4_1)))
    assert np.array_equal(validation_images(labels, sources), validates)
    assert not np.array_equal(validation_images(labels, sources, seed=1), validates)
    few = np.array([0, 1, 1, 1, 2, 2])
    validates = validation_images(few, np.arange(6))
    assert np.bincount(few[validates]).tolist() == [0, 1, 1]  # one, where one can be spared


def test_split_parts_no_source_and_forgets_no_class():
    random = np.random.default_rng(0)
    sources = random.integers(0, 200, 3000)
    labels = (sources % 5 + random.integers(0, 2, 3000)) % 8  # a source has images of two labels
    validates = validation_images(labels, sources)
    assert set(sources[validates]).isdisjoint(sources[~validates])
    shares = np.bincount(labels[validates]) / np.bincount(labels)
    assert (shares > 0.02).all() and (shares < 0.15).all()
    one = np.array([3] * 50 + [4] * 50), np.array([0] * 50 + list(range(1, 51)))
    assert set(one[0][validation_images(*one)]) == {4}  # label 3 has one source: it trains


@pytest.mark.parametrize("named", ["numbers", "names"])
def test_a_rare_class_is_trained_on_and_validated(tmp_path, named):
    """A3: folders of 30, 50, 80 images called 0.png, 1.png, ...: no class is on one side only."""
    for name, count in (("rare", 30), ("some", 50), ("many", 80)):
        (tmp_path / "set" / name).mkdir(parents=True)
        for i in range(count):
            file = f"{i}.png" if named == "numbers" else f"{name}_{i}.png"
            Image.new("L", (8, 8), i).save(tmp_path / "set" / name / file)
    pets = open_set(tmp_path / "set", 8)
    train, validation = (np.bincount(pets.labels[rows], minlength=3) for rows in pets.split())
    assert (train + validation).tolist() == [80, 30, 50]
    assert (validation >= 1).all() and (validation <= 0.2 * np.array([80, 30, 50])).all()


@pytest.mark.parametrize("world", [1, 3, 4])
def test_ranks_together_see_every_image_once_an_epoch(world):
    """Updates of 12 from 40 images: epochs begin inside an update; three take ten updates."""
    slices = [
        [rows_of_update(0, n, 12, 40)[rank::world] for n in range(10)] for rank in range(world)
    ]
    drawn = np.array(slices).transpose(1, 2, 0).reshape(3, 40)  # in the order of drawing
    for epoch in drawn:
        assert sorted(epoch) == list(range(40))  # no image twice, on whichever rank
    assert not np.array_equal(drawn[0], drawn[1])
    assert not np.array_equal(rows_of_update(1, 5, 12, 40), rows_of_update(0, 5, 12, 40))


def test_balanced_rows_give_every_label_its_turn():
    labels = np.repeat([0, 1, 4, 7], [5, 90, 1, 300])  # no image of four of the labels
    rows = np.concatenate([balanced_rows_of_update(0, n, 12, labels) for n in range(100)])
    assert np.bincount(labels[rows], minlength=8).tolist() == [300, 300, 0, 0, 300, 0, 0, 300]
    assert sorted(rows[labels[rows] == 7]) == list(range(96, 396))  # 300 draws of 300: each once
    assert (np.bincount(rows)[:5] == 60).all()
    pairs = np.repeat([0, 1], 50)
    twins = np.concatenate([balanced_rows_of_update(0, n, 2, pairs) for n in range(50)])
    assert not np.array_equal(twins[twins < 50], twins[twins >= 50] - 50)  # an order per label
    assert np.array_equal(rows[17 * 12 : 18 * 12], balanced_rows_of_update(0, 17, 12, labels))
    other = np.concatenate([balanced_rows_of_update(1, n, 12, labels) for n in range(100)])
    assert not np.array_equal(rows, other)


@pytest.mark.parametrize("world", [1, 2, 3, 4, 8])
def test_balanced_rows_have_the_expected_shares_on_every_rank(world):
    """A stride of 2, 4 or 8 over eight labels in turn would show a rank the same few for ever."""
    labels = np.repeat(np.arange(8), np.array(TABLE_4_1) // 10)
    updates = np.stack([balanced_rows_of_update(0, n, 48, labels) for n in range(200)])
    counts = np.apply_along_axis(np.bincount, 1, labels[updates])
    assert (counts == 6).all()  # every batch: six per label
    for rank in range(world):
        mine = np.bincount(labels[updates[:, rank::world]].ravel(), minlength=8) / (9600 / world)
        assert np.abs(mine - 1 / 8).max() < 4 * np.sqrt(
            7 / 64 / (9600 / world)
        )  # 4 standard errors
    for label in range(8):  # all ranks together see all images of a label before one returns
        drawn = np.bincount(updates[labels[updates] == label], minlength=len(labels))
        assert np.ptp(drawn[labels == label]) <= 1


# --------------------------------------------------------------------------- files, errors, devices


def test_whole_file_is_whole_or_not_at_all(tmp_path):
    path = tmp_path / "file.txt"
    path.write_text("before")
    with pytest.raises(ZeroDivisionError), whole_file(path) as temporary:
        temporary.write_text("half")
        1 / 0  # noqa: B018
    assert path.read_text() == "before" and os.listdir(tmp_path) == ["file.txt"]
    with pytest.raises(UserError, match="nothing was changed"), whole_file(path):
        raise OSError(28, "No space left on device")
    with whole_file(path) as temporary:
        temporary.write_text("after")
    assert path.read_text() == "after" and os.listdir(tmp_path) == ["file.txt"]


def test_a_script_without_a_main_guard_may_open_a_large_folder(tmp_path):
    """A9: no new process imports the script again."""
    (tmp_path / "set").mkdir()
    for i in range(300):
        Image.new("L", (8, 8), i % 256).save(tmp_path / "set" / f"{i}.png")
    script = tmp_path / "script.py"
    script.write_text("import data\nprint(len(data.open_set('set', 8).images))\n")
    how = {"cwd": tmp_path, "env": os.environ | {"PYTHONPATH": str(Path(data.__file__).parent)}}
    done = subprocess.run([sys.executable, script], capture_output=True, timeout=100, **how)
    assert done.stdout == b"300\n", done.stderr


def test_threads_keep_the_order_and_pass_on_errors():
    assert list(data.threaded(lambda i: i * i, range(300))) == [i * i for i in range(300)]
    with pytest.raises(ZeroDivisionError):
        list(data.threaded(lambda i: 1 / (i - 7), range(300)))


def test_too_little_memory_is_one_clear_line(capsys):
    for words in (
        "CUDA out of memory. Tried to allocate",
        "DefaultCPUAllocator: can't allocate memory",
    ):

        def program(words=words):
            raise torch.OutOfMemoryError(words)

        with pytest.raises(SystemExit, match="2"):
            data.run_program(program)
        assert capsys.readouterr().err.startswith("error: not enough memory: use a smaller --batch")
    with pytest.raises(RuntimeError, match="size mismatch"):
        data.run_program(lambda: torch.zeros(3, 3) @ torch.zeros(2))


def test_tuning_keeps_float32_products_in_float32_and_leaves_other_devices_alone():
    matmul = torch.backends.mkldnn.matmul
    before = matmul.fp32_precision
    try:
        matmul.fp32_precision = "ieee"
        data.tune("cuda")
        assert matmul.fp32_precision == "ieee"
        data.tune("cpu")
        x = torch.randn((300, 500), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        error = ((x.float() @ x.float().T).double() - x @ x.T).abs().max()  # bfloat16: about 0.3
        assert error < 1e-3
    finally:
        matmul.fp32_precision = before


# ----------------------------------------------------- faults that were found by trying the product

ADOBE_RGB = [[0.60974, 0.31111, 0.01947], [0.20528, 0.62567, 0.06087], [0.14919, 0.06322, 0.74457]]
SRGB_D50 = [[0.43607, 0.38515, 0.14307], [0.22249, 0.71687, 0.06061], [0.01392, 0.09708, 0.71410]]


def icc_profile(space, tags):
    """A colour profile (version 2.1): the header, the table of the tags, and their data."""
    table, blobs, offset = struct.pack(">I", len(tags)), b"", 132 + 12 * len(tags)
    for name, blob in tags.items():
        table += name + struct.pack(">II", offset, len(blob))
        blobs, offset = blobs + blob, offset + len(blob)
    white = struct.pack(">3i", *np.rint(np.array([0.9642, 1.0, 0.8249]) * 65536).astype(int))
    connection = b"Lab " if b"A2B0" in tags else b"XYZ "
    head = struct.pack(">I4x", offset) + b"\x02\x10\x00\x00mntr" + space + connection
    head = head.ljust(36, b"\0") + b"acsp"
    return (head.ljust(68, b"\0") + white).ljust(128, b"\0") + table + blobs


def rgb_profile(primaries, gamma):
    tags = {}
    for name, colour in zip(b"rgb", primaries):
        xyz = struct.pack(">3i", *np.rint(np.array(colour) * 65536).astype(int))
        tags[bytes([name]) + b"XYZ"] = b"XYZ \0\0\0\0" + xyz
        curve = b"curv\0\0\0\0" + struct.pack(">IH2x", 1, round(gamma * 256))
        tags[bytes([name]) + b"TRC"] = curve
    tags[b"wtpt"] = b"XYZ \0\0\0\0" + struct.pack(">3i", 63190, 65536, 54061)
    return icc_profile(b"RGB ", tags)


def cmyk_profile():
    """Lightness falls from 100 to 0 with the black ink. The table has two entries per ink."""
    identity = struct.pack(">9i", *np.rint(np.eye(3).ravel() * 65536).astype(int))
    ramp, colours = bytes(range(256)), bytes([255, 128, 128, 0, 128, 128] * 8)
    table = b"mft1\0\0\0\0\x04\x03\x02\0" + identity + 4 * ramp + colours + 3 * ramp
    return icc_profile(b"CMYK", {b"A2B0": table, b"wtpt": b"XYZ \0\0\0\0" + bytes(12)})


def test_b1_colour_profiles_become_srgb(tmp_path):
    """Against the formulas of the spaces; the label is that of the picture that people see."""
    pixel = (180, 60, 90)
    linear = (np.array(pixel) / 255) ** 2.19921875 @ np.array(ADOBE_RGB)  # XYZ at D50
    linear = np.linalg.inv(np.array(SRGB_D50)) @ linear
    expected = 255 * np.where(
        linear > 0.0031308, 1.055 * linear ** (1 / 2.4) - 0.055, 12.92 * linear
    )
    adobe = rgb_profile(ADOBE_RGB, 2.19921875)
    grey_curve = b"curv\0\0\0\0" + struct.pack(">IH2x", 1, 256)  # linear light
    grey = icc_profile(b"GRAY", {b"kTRC": grey_curve, b"wtpt": b"XYZ \0\0\0\0" + bytes(12)})
    for name, mode, value, profile, want, tolerance in (
        ("adobe.png", "RGB", pixel, adobe, expected, 2),
        ("adobe.jpg", "RGB", pixel, adobe, expected, 4),
        ("clear.png", "RGBA", (*pixel, 0), adobe, (255, 255, 255), 0),
        ("palette.png", "P", pixel, adobe, expected, 2),
        ("grey.png", "L", 128, grey, (188, 188, 188), 2),
        ("ink.tif", "CMYK", (9, 99, 9, 127), cmyk_profile(), (119, 119, 119), 4),
        ("wrong.png", "RGB", pixel, cmyk_profile(), pixel, 0),  # of other pixels
        ("damaged.png", "RGB", pixel, b"no profile", pixel, 0),
        ("none.png", "RGB", pixel, None, pixel, 0),
    ):
        image = Image.new("RGB" if mode == "P" else mode, (16, 16), value)
        image = image.quantize(4) if mode == "P" else image
        image.save(tmp_path / name, **({"icc_profile": profile} if profile else {}))
        found = decode(tmp_path / name, 16)
        assert np.abs(found - np.array(want, float)).max() <= tolerance, name


def test_a10_large_texts_and_profiles_do_not_hide_a_picture(tmp_path):
    from PIL.PngImagePlugin import PngInfo

    text = PngInfo()
    text.add_text("history", "x" * 3_000_000, zip=True)
    halves().save(tmp_path / "text.png", pnginfo=text)
    profile = rgb_profile(ADOBE_RGB, 2.2) + bytes(3_000_000)
    halves().save(tmp_path / "profile.png", icc_profile=profile)
    looks_like(decode(tmp_path / "text.png", 32))
    assert decode(tmp_path / "profile.png", 64).shape == (64, 64, 3)


def test_b15_a22_what_pillow_opens_is_an_image_and_the_rest_is_counted(tmp_path):
    """Not the pictures in folders of systems, such as the thumbnails of a NAS."""
    root = tmp_path / "set"
    for name in ("a.jfif", "b.jpe", "c.ppm", "d.tga", "e.jp2", "@eaDir/f.png", ".g/h.png"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        kind = {".jfif": "JPEG", ".jpe": "JPEG"}.get(Path(name).suffix)
        halves().save(root / name, kind)
    for name in ("notes.txt", "more.txt", "photo.cr2", "SOURCES.csv"):
        (root / name).write_text("file,source\n")
    found = open_set(root, 16)
    assert len(found.labels) == 5
    assert "files of other kinds passed over: 2 .txt, 1 .cr2" in found.report()
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "raw.cr2").touch()
    with pytest.raises(UserError, match="no images in it or below it; other files: 1 .cr2"):
        open_set(tmp_path / "empty", 16)


def test_a17_parts_of_a_set_and_archives_are_named(tmp_path):
    for part in ("train", "val"):
        for name in "ab":
            folder = tmp_path / "set" / part / name
            folder.mkdir(parents=True)
            halves().save(folder / "0.png")
    with pytest.raises(UserError, match="train, val are parts of a set, not classes; name one"):
        open_set(tmp_path / "set", 16)
    assert open_set(tmp_path / "set" / "train", 16).classes == ["a", "b"]
    np.savez(tmp_path / "set.npz", **{f"image{i}": 0 for i in range(200)})
    (tmp_path / "set.npz").rename(tmp_path / "set.zip")
    with pytest.raises(UserError, match="not an .npz file; unpack it first") as error:
        open_set(tmp_path / "set.zip", 16)
    assert len(str(error.value)) < 200


def test_a19_a_machine_without_a_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert data.cache_folder() == tmp_path / "xdg" / "color-diffusion"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(data.tempfile, "gettempdir", lambda: str(tmp_path))

    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(data.Path, "home", no_home)
    assert data.cache_folder() == tmp_path / "color-diffusion"
    (tmp_path / "file").touch()
    monkeypatch.setattr(data.Path, "home", lambda: tmp_path / "file")  # nothing can be made in it
    assert data.cache_folder() == tmp_path / "color-diffusion"


def test_a19_class_names_that_are_no_utf8(tmp_path, run):
    for name in (b"caf\xe9", b"tea"):
        folder = os.path.join(os.fsencode(tmp_path), b"set", name)
        os.makedirs(folder)
        halves().save(tmp_path / "x.png")
        os.rename(tmp_path / "x.png", os.path.join(folder, b"0.png"))
    code, out, err = run("data", "letters", "--data", tmp_path / "set")
    assert code == 0 and "caf\\udce9" in out, err


def test_a_pipe_or_a_dead_link_is_left_out(tmp_path):
    for name in ("a.png", "b.png"):
        halves().save(tmp_path / name)
    (tmp_path / "link.png").symlink_to(tmp_path / "nowhere.png")
    os.mkfifo(tmp_path / "pipe.png")  # reading it would wait for ever
    assert "2 of 4 files left out: 2 No such file, or a pipe" in open_set(tmp_path, 16).report()


def test_a11_a_failed_compilation_is_one_clear_line(capsys):
    def compiler(graph, example):
        raise OSError("no C++ compiler")

    def main():
        torch.compile(lambda x: x + 1, backend=compiler)(torch.zeros(2))

    with pytest.raises(SystemExit) as end:
        data.run_program(main)
    err = capsys.readouterr().err
    assert end.value.code == 2 and err.startswith("error: --compile does not work here")
    assert "leave it out" in err and len(err.splitlines()) == 1


def test_a_plain_image_has_95_per_cent_of_its_pixels_nearer_than_6():
    """Two white rows of 64, and four whose Delta-E from the others is 7.4 or 4.7."""
    for grey, plain in ((147, False), (140, True)):
        image = np.full((64, 64, 3), 128, np.uint8)
        image[:2], image[2:6] = 255, grey
        assert is_plain(image) == plain
