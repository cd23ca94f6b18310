"""Section 4.2.2: colours and their labels, folders of paintings, the embedded painter."""

import csv
import os
import struct
import threading
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFont

import data
from data import (
    ALPHABET,
    COLOURS,
    TABLE_4_1,
    Paintings,
    UserError,
    balanced_rows_of_update,
    decode,
    is_plain,
    lab_to_rgb,
    letters_from_fonts,
    mean_colour,
    nearest_colour,
    open_letters,
    open_packed,
    open_paintings,
    pack_once,
    pack_paintings,
    paint,
    paint_set,
    relabel,
    rgb_to_lab,
    rows_of_update,
    transition_report,
)

NAMES = list(COLOURS)

# ---------------------------------------------------------------------------------------------------- colours

# Published CIE-LAB values (D65, 2 degrees; brucelindbloom.com's calculator): the corners of sRGB, and grey
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
    assert np.abs(lab_to_rgb(lab) - colours).max() < 0.01
    corners = np.array(list(ANCHORS.values()))[:8]
    apart = np.linalg.norm(corners[:, None] - corners, axis=-1)
    assert apart[0, 1] == 100 and abs(apart.max() - 258.7) < 0.05  # black to white is 441.7 in RGB


def test_lab_goes_back_and_forth():
    colours = np.random.default_rng(0).uniform(0, 255, (500, 4, 3))
    assert np.abs(lab_to_rgb(rgb_to_lab(colours)) - colours).max() < 1e-9
    pixels = np.random.default_rng(0).integers(0, 256, (9, 500, 3), np.uint8)
    assert rgb_to_lab(pixels).dtype == rgb_to_lab(pixels.astype(np.float32)).dtype == np.float32
    assert np.abs(rgb_to_lab(pixels) - rgb_to_lab(pixels.astype(float))).max() < 1e-3
    assert np.array_equal(lab_to_rgb(rgb_to_lab(pixels)).round(), pixels)
    assert np.allclose(lab_to_rgb(np.array([[120.0, 0, 0], [-9, 0, 0]])), [[255] * 3, [0] * 3])  # outside: clipped


def lab_by_hand(pixel):
    """CIE-LAB of one pixel from the textbook's formulas, an oracle that shares nothing with data.py."""
    linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in (c / 255 for c in pixel)]
    matrix = [(0.4124564, 0.3575761, 0.1804375), (0.2126729, 0.7151522, 0.0721750), (0.0193339, 0.1191920, 0.9503041)]
    xyz = [sum(m * v for m, v in zip(row, linear)) / white for row, white in zip(matrix, (0.95047, 1.0, 1.08883))]
    fx, fy, fz = (t ** (1 / 3) if t > 216 / 24389 else (24389 / 27 * t + 16) / 116 for t in xyz)
    return 116 * fy - 16, 500 * (fx - fy), 200 * (fy - fz)


def test_table_4_1_labels_in_its_order():
    assert NAMES == ["orange", "green", "blue", "purple", "yellow", "red", "black", "white"]
    colours = np.array(list(COLOURS.values()))
    assert nearest_colour(colours).tolist() == nearest_colour(rgb_to_lab(colours), "lab").tolist() == list(range(8))


def test_nearest_colour_against_a_plain_loop():
    """E39: to LAB first, then the mean, with sRGB's gamma and white D65."""
    images = np.random.default_rng(0).integers(0, 256, (40, 5, 4, 3), np.uint8)
    images[:20] //= 3
    for space, convert in (("rgb", lambda pixel: pixel), ("lab", lab_by_hand)):
        expected = []
        for image in images.tolist():
            pixels = [convert(pixel) for row in image for pixel in row]
            mean = [sum(values) / len(pixels) for values in zip(*pixels)]
            distances = [sum((m - v) ** 2 for m, v in zip(mean, convert(label))) for label in COLOURS.values()]
            expected.append(distances.index(min(distances)))
        assert nearest_colour(mean_colour(images, space), space).tolist() == expected
    half = np.array([[[0, 0, 0], [255, 255, 255]]], np.uint8)
    assert mean_colour(half, "lab")[0] == pytest.approx(50, abs=1e-3)  # the mean RGB, (127.5,) * 3, would have L = 53.4


def test_greys_are_purple_in_rgb():
    """E38: fig. 4.2's mismatch is a property of the rule: greys from 65 to 159 are nearest to purple in RGB, never in LAB."""
    greys = np.arange(256)[:, None].repeat(3, 1)
    names = np.array(NAMES)[nearest_colour(greys)]
    assert (names[:64] == "black").all() and (names[65:160] == "purple").all() and (names[160:] == "white").all()
    assert names[64] == "green"  # a tie of black, green and purple: the first in the table's order
    in_lab = np.array(NAMES)[nearest_colour(rgb_to_lab(greys), "lab")]
    assert (in_lab[:119] == "black").all() and (in_lab[119:] == "white").all()
    assert NAMES[nearest_colour([120, 110, 90])] == "purple"  # a muted brown


# ---------------------------------------------------------------------------------------------------- odd images

TEAL, ROSE = (20, 120, 110), (220, 150, 160)


def halves(size=(64, 64), left=TEAL, right=ROSE, mode="RGB"):
    """A picture of two colours, left and right: what it should look like is known, and it is not plain."""
    image = Image.new("RGB", size, left)
    image.paste(right, (size[0] // 2, 0, *size))
    return image.convert(mode)


def looks_like(image, left=TEAL, right=ROSE, tolerance=2):
    pixels = np.asarray(image).astype(int)
    assert pixels.shape[:2] == (32, 32)
    return np.abs(pixels[:, 3:13] - left).max() <= tolerance and np.abs(pixels[:, 19:29] - right).max() <= tolerance


def write_png(path, width, height, depth, colour, *chunks):
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)), *chunks, (b"IEND", b"")]
    data_of = b"".join(struct.pack(">I", len(c)) + k + c + struct.pack(">I", zlib.crc32(k + c)) for k, c in chunks)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + data_of)


def png_of(path, width, height):
    """The header of a PNG of that size, and no pixels."""
    write_png(path, width, height, 8, 2, (b"IDAT", zlib.compress(b"")))


def deep_png(path, pixels, *chunk):
    """A 16-bit grey PNG with a chunk that Pillow does not write."""
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    write_png(path, *pixels.shape[::-1], 16, 0, chunk, (b"IDAT", zlib.compress(rows)))


def test_images_of_every_odd_kind_come_out_as_they_look(tmp_path):
    def saved(image, name, **how):
        image.save(tmp_path / name, **how)
        return decode(tmp_path / name, 32)

    assert looks_like(saved(halves(), "plain.png"), tolerance=0)
    assert looks_like(saved(halves(mode="CMYK"), "cmyk.jpg", quality=95), tolerance=6)
    assert looks_like(saved(halves(mode="CMYK"), "cmyk.tif"))
    assert looks_like(saved(halves().quantize(8), "palette.png"))
    grey = [(round(np.dot(c, (0.299, 0.587, 0.114))),) * 3 for c in (TEAL, ROSE)]
    assert looks_like(saved(halves(mode="L"), "grey.png"), *grey)
    assert looks_like(saved(halves(mode="LA"), "grey_alpha.png"), *grey)
    assert looks_like(saved(halves(left=(0,) * 3, right=(255,) * 3, mode="1"), "bilevel.png"), (0,) * 3, (255,) * 3)
    deep = np.repeat(np.array([[100 * 257] * 32 + [200 * 257] * 32], np.uint16), 64, 0)
    for name in ("deep.png", "deep.tif"):  # not clipped to white
        assert looks_like(saved(Image.fromarray(deep), name), (100,) * 3, (200,) * 3)

    clear = halves(mode="RGBA")
    clear.paste((10, 200, 30, 0), (0, 0, 32, 64))  # transparent: the paper shows, not the colour that hides there
    assert looks_like(saved(clear, "clear.png"), (255,) * 3, ROSE)
    assert looks_like(saved(clear, "clear.webp", lossless=True), (255,) * 3, ROSE)
    indexed = halves().quantize(8)
    assert looks_like(saved(indexed, "indexed.png", transparency=indexed.getpixel((0, 0))), (255,) * 3, ROSE)

    turned = halves().rotate(90, expand=True)  # what a camera held upright stores
    exif = Image.Exif()
    exif[0x0112] = 6  # turn clockwise to view
    assert looks_like(saved(turned, "turned.jpg", exif=exif, quality=95), tolerance=6)
    transparent = turned.convert("RGBA")
    transparent.putpixel((0, 0), (0, 0, 0, 0))
    assert looks_like(saved(transparent, "turned.png", exif=exif), tolerance=0)  # turned and transparent
    assert looks_like(saved(Image.fromarray(np.rot90(deep).copy()), "turned_deep.png", exif=exif), (100,) * 3, (200,) * 3)
    deep_png(tmp_path / "clear_deep.png", deep, b"tRNS", struct.pack(">H", 100 * 257))
    assert looks_like(decode(tmp_path / "clear_deep.png", 32), (255,) * 3, (200,) * 3)  # one grey value is transparent
    broken = (tmp_path / "turned.jpg").read_bytes().replace(b"MM\x00*", b"MM\x00!").replace(b"II*\x00", b"II!\x00")
    (tmp_path / "odd_exif.jpg").write_bytes(broken)
    assert decode(tmp_path / "odd_exif.jpg", 32).size == (32, 32)  # nonsense beside the picture does not cost the picture
    assert looks_like(saved(halves(), "pages.tif", save_all=True, append_images=[halves(left=ROSE)]), tolerance=0)  # first page
    assert looks_like(saved(halves((3000, 1000), left=(9, 9, 9), right=(9, 9, 9)), "large.jpg"), (9,) * 3, (9,) * 3)
    assert looks_like(saved(halves((2400, 2400)), "square.jpg", quality=95), tolerance=6)  # decoded at a reduced size


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
    Image.fromarray(np.random.default_rng(0).normal(size=(40, 40)).astype(np.float32)).save(folder / "float.tif")
    Image.fromarray(np.full((40, 40), 1_000_000, np.int32)).save(folder / "integer.tif")
    Image.new("RGB", (50, 50), TEAL).save(folder / "flat.png")
    Image.new("RGBA", (50, 50), (200, 10, 10, 0)).save(folder / "invisible.png")
    (folder / "lost.png").symlink_to("nowhere.png")
    os.mkfifo(folder / "pipe.png")  # opening it would wait for ever
    return {
        "truncated.jpg": "damaged: ",
        "text.png": "not an image",
        "empty.jpg": "empty file",
        "pixels.png": "damaged: ",
        "moving.gif": "animated: 2 frames",
        "moving.png": "animated: 2 frames",
        "moving.webp": "animated: 2 frames",
        "bomb.png": "too large",
        "float.tif": "32-bit pixels",
        "integer.tif": "32-bit pixels",
        "flat.png": "plain",
        "invisible.png": "plain",
        "lost.png": "not a file",
        "pipe.png": "not a file",
    }


def read_files_csv(folder):
    with (folder / "files.csv").open(newline="") as file:
        return {row["file"]: row for row in csv.DictReader(file)}


def test_bad_files_are_rejected_with_a_reason_and_stop_nothing(tmp_path):
    root = tmp_path / "set"
    (root / "style").mkdir(parents=True)
    reasons = write_rejected(root / "style")
    for name in ("a.png", "z.png"):
        halves().save(root / name)
    paintings = open_paintings(root, 32)
    table = read_files_csv(tmp_path / "set.packed32")
    assert len(paintings.images) == 2 and [table["a.png"]["row"], table["z.png"]["row"]] == ["0", "1"]
    for name, reason in reasons.items():
        assert table[f"style/{name}"]["rejected"].startswith(reason), (name, table[f"style/{name}"])
        assert table[f"style/{name}"]["row"] == table[f"style/{name}"]["label"] == ""
    assert len(table) == len(reasons) + 2
    report = paintings.report()
    assert "14 of 16 files rejected: 3 animated, " in report and "2 damaged" in report and "files.csv" in report


def test_plain_images_survive_nothing_that_a_camera_adds():
    random, size = np.random.default_rng(0), 256
    y, x = np.mgrid[-1 : 1 : size * 1j, -1 : 1 : size * 1j]
    for colour in ((30, 60, 200), (128, 0, 128), (240, 240, 235), (25, 25, 25)):
        flat = np.full((size, size, 3), colour, float)
        signed = flat.copy()
        signed[225:245, 190:245] = (0, 0, 0) if sum(colour) > 300 else (255, 255, 255)  # 1.7 % of the picture
        cases = {
            "flat": flat,
            "noise": flat + random.normal(0, 12, flat.shape),
            "vignette": flat * (1 - 0.12 * (x**2 + y**2))[..., None],
            "canvas": flat + 12 * (np.sin(60 * x) * np.sin(60 * y))[..., None],
            "signature": signed,
            "all": signed * (1 - 0.04 * (x**2 + y**2))[..., None] + random.normal(0, 8, flat.shape),
        }
        for name, case in cases.items():
            assert is_plain(Image.fromarray(np.clip(case, 0, 255).astype(np.uint8))), (name, colour)
        square = flat.copy()
        square[80:160, 80:160] = 255 - flat[80:160, 80:160]  # a tenth of the picture in another colour is a picture
        gradient = flat + 60 * x[..., None] * (1 if sum(colour) < 600 else -1)
        for picture in (square, gradient):
            assert not is_plain(Image.fromarray(np.clip(picture, 0, 255).astype(np.uint8))), colour


# ---------------------------------------------------------------------------------------------------- packing


def write_paintings(root, count=24, size=(48, 40), seed=0):
    """Pictures of every kind of colour in nested style folders; returns file -> its pixels."""
    random, pixels = np.random.default_rng(seed), {}
    for i in range(count):
        file = Path(("Action_painting", "Color_Field_Painting/large", ".")[i % 3]) / f"artist_{i}.png"
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        base = random.integers(0, 2, 3) * random.integers(100, 256)
        pixels[file.as_posix()] = np.clip(base + random.normal(0, 40, (size[1], size[0], 3)), 0, 255).astype(np.uint8)
        Image.fromarray(pixels[file.as_posix()]).resize(size, Image.Resampling.NEAREST).save(root / file)
    return pixels


@pytest.mark.parametrize("space", ["rgb", "lab"])
def test_packed_labels_and_pixels_against_a_plain_loop(tmp_path, space):
    pixels = write_paintings(tmp_path / "wikiart", size=(48, 40))
    paintings = pack_paintings(tmp_path / "wikiart", tmp_path / "out", 40, space)
    table = read_files_csv(tmp_path / "out")
    assert list(table) == sorted(pixels, key=Path) and isinstance(paintings.images, np.memmap)
    assert paintings.classes == NAMES
    counts = Counter()
    for row, (file, line) in enumerate(table.items()):
        crop = pixels[file][:, 4:44]  # the centre of 48 x 40; at this size nothing is resized
        assert np.array_equal(paintings.images[int(line["row"])], crop) and int(line["row"]) == row
        points = [lab_by_hand(p) if space == "lab" else p for p in crop.reshape(-1, 3).tolist()]
        labels = [lab_by_hand(c) if space == "lab" else c for c in COLOURS.values()]
        mean = np.mean(points, 0)
        expected = min(range(8), key=lambda k: sum((mean - labels[k]) ** 2))  # noqa: B023
        assert paintings.labels[row] == expected and line["label"] == NAMES[expected]
        counts[NAMES[expected]] += 1
    assert len(counts) > 3
    for name in counts:
        assert f"{name} {counts[name]}" in paintings.report()


def test_a_packed_set_is_opened_and_never_packed_twice(tmp_path, monkeypatch):
    write_paintings(tmp_path / "set", 6)
    first = open_paintings(tmp_path / "set", 16)
    monkeypatch.setattr(data, "pack", None)
    assert np.array_equal(open_paintings(tmp_path / "set", 16).images, first.images)
    assert np.array_equal(open_paintings(tmp_path / "set.packed16", 16).labels, first.labels)
    with pytest.raises(UserError, match="packed at 16 pixels, not 32"):
        open_paintings(tmp_path / "set.packed16", 32)


def test_a_changed_set_is_packed_again(tmp_path):
    write_paintings(tmp_path / "set", 6)
    assert len(np.unique(open_paintings(tmp_path / "set", 16).sources)) == 6
    halves().save(tmp_path / "set" / "Color_Field_Painting" / "large" / "new.png")
    assert len(open_paintings(tmp_path / "set", 16).images) == 7
    (tmp_path / "set" / "SOURCES.csv").write_text("file,source\nartist_0.png,a\nartist_1.png,a\nartist_2.png,a\nartist_3.png\n")
    assert len(np.unique(open_paintings(tmp_path / "set", 16).sources)) == 5  # three files are one source now


def test_files_of_one_name_are_one_picture_but_numbers_are_no_names(tmp_path, refused):
    for folder in ("a", "b", "c"):
        (tmp_path / "set" / folder).mkdir(parents=True)
        for k in range(30):
            halves().save(tmp_path / "set" / folder / f"{k}.png")
            halves().save(tmp_path / "set" / folder / f"painting_{k}.png")
    paintings = open_paintings(tmp_path / "set", 16)
    assert len(paintings.labels) == 180 and len(np.unique(paintings.sources)) == 90 + 30
    for folder in ("a", "b"):
        (tmp_path / "same" / folder).mkdir(parents=True)
        halves().save(tmp_path / "same" / folder / "untitled.png")
    error = refused("train", "--stage", "vqgan", "--data", tmp_path / "same", "--size", 16, "--out", tmp_path / "run")
    assert "too few images to keep some for validation" in error and not (tmp_path / "run").exists()


def test_a_link_to_a_folder_above_counts_no_image_twice(tmp_path):
    write_paintings(tmp_path / "set", 6)
    (tmp_path / "set" / "Action_painting" / "up").symlink_to(tmp_path / "set")
    (tmp_path / "elsewhere").mkdir()
    halves().save(tmp_path / "elsewhere" / "linked.png")
    (tmp_path / "set" / "linked").symlink_to(tmp_path / "elsewhere")
    assert len(open_paintings(tmp_path / "set", 16).images) == 7


def test_folders_named_after_colours_keep_their_labels_in_the_order_of_the_table(tmp_path):
    """E40: sorted by name, black would be 0 and yellow 7."""
    for name in ("Yellow", "black", "WHITE", "orange"):
        (tmp_path / "set" / name).mkdir(parents=True)
        halves().save(tmp_path / "set" / name / "a.png")  # one picture in all of them: the label is the folder's
    paintings = open_paintings(tmp_path / "set", 32)
    table = read_files_csv(tmp_path / "set.packed32")
    labels = {file.split("/")[0]: int(paintings.labels[int(line["row"])]) for file, line in table.items()}
    assert labels == {"Yellow": 4, "black": 6, "WHITE": 7, "orange": 0} and paintings.classes == NAMES
    assert len(np.unique(paintings.sources)) == 1  # the same file name
    halves().save(tmp_path / "set" / "stray.png")
    with pytest.raises(UserError, match="stray.png is in none of them"):
        open_paintings(tmp_path / "set", 32)


@pytest.mark.parametrize("cut", [False, True])
def test_an_interrupted_packing_goes_on_where_it_stopped(tmp_path, monkeypatch, cut):
    root, read, seen = tmp_path / "set", data.read_painting, []
    write_paintings(root, 12)
    Image.new("RGB", (30, 30), TEAL).save(root / "b_plain.png")
    whole = pack_paintings(root, tmp_path / "whole", 16)

    def interrupted(task, **how):
        if len(seen) == 8:
            raise KeyboardInterrupt
        seen.append(task[0])
        return read(task, **how)

    monkeypatch.setattr(data, "read_painting", interrupted)
    with pytest.raises(KeyboardInterrupt):
        pack_paintings(root, tmp_path / "out", 16)
    assert not (tmp_path / "out").exists()
    growing = tmp_path / ".out.unfinished"
    if cut:  # a power cut: half a line, and an image that no line tells of
        with (growing / "results.txt").open("a") as file:
            file.write("3")
        with (growing / "images.npy").open("ab") as file:
            file.write(bytes(500))
    seen.clear()
    again = pack_paintings(root, tmp_path / "out", 16)
    assert len(seen) == 13 - 8 and not growing.exists()
    assert (tmp_path / "out" / "images.npy").read_bytes() == (tmp_path / "whole" / "images.npy").read_bytes()
    assert (tmp_path / "out" / "files.csv").read_text() == (tmp_path / "whole" / "files.csv").read_text()
    assert np.array_equal(again.labels, whole.labels) and np.array_equal(again.sources, whole.sources)


def test_an_unfinished_set_of_other_settings_is_not_gone_on_with(tmp_path, monkeypatch):
    write_paintings(tmp_path / "set", 4)
    monkeypatch.setattr(data, "read_painting", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        pack_paintings(tmp_path / "set", tmp_path / "out", 16)
    monkeypatch.undo()
    assert pack_paintings(tmp_path / "set", tmp_path / "out", 20).images.shape == (4, 20, 20, 3)


def test_several_processes_pack_once(tmp_path):
    """Each thread opens the lock for itself, as a process would."""
    packed, done, start = [], [], threading.Barrier(4)

    def pack(folder, state):
        packed.append(threading.get_ident())
        folder.mkdir()
        (folder / "set.json").write_text('{"state": {"size": 3}}')

    def call():
        start.wait()
        pack_once(tmp_path / "set", {"size": 3}, pack)
        done.append(1)

    threads = [threading.Thread(target=call) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(packed) == 1 and len(done) == 4


def test_processes_give_what_one_process_gives(tmp_path, monkeypatch):
    write_paintings(tmp_path / "set", 300, (20, 20))
    one = pack_paintings(tmp_path / "set", tmp_path / "one", 16, processes=1)
    two = pack_paintings(tmp_path / "set", tmp_path / "two", 16, processes=2)
    assert np.array_equal(one.images, two.images) and np.array_equal(one.labels, two.labels)


def test_what_is_not_a_set_is_one_clear_line_and_nothing_is_overwritten(tmp_path, refused):
    write_paintings(tmp_path / "set", 4)
    (tmp_path / "hollow").mkdir()
    (tmp_path / "flat").mkdir()
    Image.new("RGB", (30, 30), TEAL).save(tmp_path / "flat" / "a.png")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    out, root = tmp_path / "out", tmp_path / "set"
    assert "no such folder" in refused("data", "paintings", "--data", tmp_path / "nowhere")
    assert "no images in it" in refused("data", "paintings", "--data", tmp_path / "hollow")
    assert "all of 1 files were rejected: 1 plain" in refused("data", "paintings", "--data", tmp_path / "flat", "--out", out)
    assert "holds other files" in refused("data", "paintings", "--data", root, "--out", tmp_path / "mine")
    assert "lies within --data" in refused("data", "paintings", "--data", root, "--out", root / "packed")
    assert "lies within --data" in refused("data", "paintings", "--data", root, "--out", root)
    written = refused("data", "paintings", "--data", root, "--out", tmp_path / "mine" / "thesis.txt")
    assert "thesis.txt: Not a directory" in written
    assert "--space: such a set needs a folder of its own" in refused("data", "paintings", "--data", root, "--space", "lab")
    assert "--count: means nothing with --data" in refused("data", "paintings", "--data", root, "--count", 5, "--out", out)
    bad = refused("data", "paintings", "--data", root, "--out", out, "--palette", "red=#ff0000", "sky=blu")
    assert "sky=blu: expected name=#rrggbb" in bad
    (root / "SOURCES.csv").write_text("name,painter\na,b\n")
    assert "expected the columns file and source" in refused("data", "paintings", "--data", root, "--out", out)
    (root / "SOURCES.csv").write_text("")
    assert "found nothing" in refused("data", "paintings", "--data", root, "--out", out)
    (root / "SOURCES.csv").unlink()
    assert not out.exists() and sorted(path.name for path in tmp_path.iterdir()) == ["flat", "hollow", "mine", "set"]
    pack_paintings(root, out, 16)
    before = (out / "images.npy").read_bytes()
    assert "holds another packed set" in refused("data", "paintings", "--data", root, "--out", out, "--size", 32)
    assert (out / "images.npy").read_bytes() == before
    (out / "labels.npy").write_bytes(b"")
    assert "cannot be read" in refused("data", "relabel", "--data", out)
    for name in ("cat", "dog"):
        (tmp_path / "pets" / name).mkdir(parents=True)
        halves().save(tmp_path / "pets" / name / "a.png")
    open_packed(tmp_path / "pets", 32)
    assert "its labels are no colours" in refused("data", "relabel", "--data", tmp_path / "pets.packed32")


# ---------------------------------------------------------------------------------------------------- split, balance


def painted_labels(labels, sources):
    return Paintings(np.zeros((len(labels), 1, 1, 3), np.uint8), np.asarray(labels), np.asarray(sources), NAMES)


def test_split_is_five_per_cent_of_every_label_and_seeded():
    """E68: 5.2 shows a validation loss and describes no split; this is the one taken here."""
    labels = np.repeat(np.arange(8), TABLE_4_1)
    assert len(labels) == 19_774  # E36: "19k" in 4.2.2
    assert TABLE_4_1[4] == 142 != 147  # E36: yellow, in the table and in 5.4
    paintings = painted_labels(labels, np.arange(len(labels)))
    train, validation = paintings.split()
    assert sorted([*train, *validation]) == list(range(len(labels)))
    assert np.array_equal(np.bincount(labels[validation]), np.rint(0.05 * np.array(TABLE_4_1)))
    assert np.array_equal(paintings.split()[1], validation) and not np.array_equal(paintings.split(seed=1)[1], validation)
    few = painted_labels([0, 1, 1, 1, 2, 2], np.arange(6)).split()[1]
    assert np.bincount(np.array([0, 1, 1, 1, 2, 2])[few]).tolist() == [0, 1, 1]  # at least one, where one can be spared


def test_split_parts_no_source():
    random = np.random.default_rng(0)
    sources = random.integers(0, 200, 3000)
    labels = (sources % 5 + random.integers(0, 2, 3000)) % 8  # a source has images of two labels
    train, validation = painted_labels(labels, sources).split()
    assert set(sources[train]).isdisjoint(sources[validation])
    shares = np.bincount(labels[validation]) / np.bincount(labels)
    assert (shares > 0.02).all() and (shares < 0.11).all()
    large = painted_labels(np.repeat(np.arange(8), 40), np.repeat(np.arange(16), 20))  # two sources of 20 images a label
    train, validation = large.split()
    assert len(validation) == 20 and set(large.sources[train]).isdisjoint(large.sources[validation])
    assert not len(painted_labels(np.arange(8), np.arange(8)).split()[1])  # one image a label: none can be spared
    one = painted_labels([3] * 50 + [4] * 50, [0] * 50 + list(range(1, 51)))
    assert set(one.labels[one.split()[1]]) == {4}  # label 3 has one source: all of it stays for training


@pytest.mark.parametrize("world", [1, 3, 4])
def test_ranks_together_see_every_image_once_an_epoch(world):
    """Updates of 12 from 40 images: epochs begin in the middle of an update, and three of them take ten."""
    slices = np.array([[rows_of_update(0, n, 12, 40)[rank::world] for n in range(10)] for rank in range(world)])
    drawn = slices.transpose(1, 2, 0).reshape(3, 40)  # update, place, rank: the order in which they are drawn
    for epoch in drawn:
        assert sorted(epoch) == list(range(40))  # no image twice, on whichever rank


def test_balanced_rows_give_every_label_its_turn():
    labels = np.repeat([0, 1, 4, 7], [5, 90, 1, 300])  # no image of four of the labels
    rows = np.concatenate([balanced_rows_of_update(0, n, 12, labels) for n in range(100)])
    assert np.bincount(labels[rows], minlength=8).tolist() == [300, 300, 0, 0, 300, 0, 0, 300]
    assert sorted(rows[labels[rows] == 7]) == list(range(96, 396))  # 300 draws of 300 images: each once
    assert (np.bincount(rows)[:5] == 60).all()
    twins = np.concatenate([balanced_rows_of_update(0, n, 2, np.repeat([0, 1], 50)) for n in range(50)])
    assert not np.array_equal(twins[twins < 50], twins[twins >= 50] - 50)  # every label has an order of its own
    assert np.array_equal(rows[17 * 12 : 18 * 12], balanced_rows_of_update(0, 17, 12, labels))  # of (seed, n) alone
    assert not np.array_equal(rows, np.concatenate([balanced_rows_of_update(1, n, 12, labels) for n in range(100)]))


@pytest.mark.parametrize("world", [1, 2, 3, 4, 8])
def test_balanced_rows_have_the_expected_shares_on_every_rank(world):
    """A stride of 2, 4 or 8 over eight labels in turn would show a rank the same four, two or one of them for ever."""
    labels = np.repeat(np.arange(8), np.array(TABLE_4_1) // 10)
    updates = np.stack([balanced_rows_of_update(0, n, 48, labels) for n in range(200)])
    assert (np.apply_along_axis(np.bincount, 1, labels[updates]) == 6).all()  # every batch: six a label
    for rank in range(world):
        mine = np.bincount(labels[updates[:, rank::world]].ravel(), minlength=8) / (9600 / world)
        assert np.abs(mine - 1 / 8).max() < 4 * np.sqrt(7 / 64 / (9600 / world))  # four standard errors
    for label in range(8):  # and all ranks together see all images of a label before one returns
        drawn = np.bincount(updates[labels[updates] == label], minlength=len(labels))[labels == label]
        assert np.ptp(drawn) <= 1


# ---------------------------------------------------------------------------------------------------- relabel, pictures


def test_relabel_counts_against_a_plain_loop(tmp_path, run):
    write_paintings(tmp_path / "set", 30)
    grey = np.clip(np.random.default_rng(0).normal(100, 25, (40, 40, 1)), 0, 255).astype(np.uint8).repeat(3, 2)
    Image.fromarray(grey).save(tmp_path / "set" / "grey.png")  # fig. 4.2 (a): purple, should be black
    paintings = open_paintings(tmp_path / "set", 24)
    rgb, lab, excess = relabel(paintings)
    assert np.array_equal(rgb, paintings.labels) and (excess >= 0).all() and ((excess > 0) == (rgb != lab)).all()
    row = int(read_files_csv(tmp_path / "set.packed24")["grey.png"]["row"])
    assert (NAMES[rgb[row]], NAMES[lab[row]]) == ("purple", "black")
    moves = Counter(zip(rgb.tolist(), lab.tolist()))
    report = transition_report(rgb, lab, NAMES)
    table = [list(map(int, line.split()[1:])) for line in report.splitlines()[-8:]]
    assert table == [[moves[a, b] for b in range(8)] for a in range(8)]
    assert f"changes {100 * (rgb != lab).mean():.1f} % of 31 labels" in report
    code, out, _ = run("data", "relabel", "--data", tmp_path / "set.packed24", "--out", tmp_path / "figures")
    assert code == 0 and report in out and "100.0 % by RGB" in out
    assert {path.name for path in (tmp_path / "figures").iterdir()} == {"figure_4_2.png", "figure_4_3.png"}


def test_bars_are_as_high_as_their_shares():
    rows = [{"label": label, "set": "all", "share": share} for label, share in (("a", 50), ("b", 25), ("c", 25))]
    picture = np.asarray(data.bars(rows, "share", "")).astype(int)
    ink = (np.abs(picture - data.PALETTE[0]).max(-1) < 12)[40:].sum(0)  # of the bars' colour in every column
    heights = [np.median(part[part > 20]) for part in np.array_split(ink[70:880], 3)]
    assert heights[0] / heights[1] == pytest.approx(2, rel=0.02) and heights[1] == heights[2]


def test_a_palette_of_ones_own(tmp_path, run):
    write_paintings(tmp_path / "set", 8)
    halves(left=(0, 90, 0), right=(0, 120, 30)).save(tmp_path / "set" / "green.png")
    how = ["--out", tmp_path / "out", "--size", 32, "--palette", "sea=#0000ff", "wood=darkgreen", "--sheet", tmp_path / "a.png"]
    code, out, _ = run("data", "paintings", "--data", tmp_path / "set", *how)
    assert code == 0 and "2 classes" in out and Image.open(tmp_path / "a.png").size[0] > 8 * 96
    paintings = open_paintings(tmp_path / "out", 32)
    assert paintings.classes == ["sea", "wood"]
    assert paintings.labels[int(read_files_csv(tmp_path / "out")["green.png"]["row"])] == 1


# ---------------------------------------------------------------------------------------------------- painter


def test_pictures_have_the_colour_that_was_asked_for():
    labels = np.arange(48) % 8
    pictures = np.stack([paint(seed, label, 64) for seed, label in enumerate(labels)])
    assert pictures.dtype == np.uint8 and pictures.shape == (48, 64, 64, 3)
    for space in ("rgb", "lab"):
        assert (nearest_colour(mean_colour(pictures, space), space) == labels).mean() > 0.97
    assert not any(is_plain(Image.fromarray(picture)) for picture in pictures)
    assert np.array_equal(paint(3, 3, 64), pictures[3]) and not np.array_equal(paint(4, 3, 64), pictures[3])


def test_the_default_set_is_painted_once_and_balanced(tmp_path, monkeypatch):
    monkeypatch.setattr(data.Path, "home", lambda: tmp_path)
    small = data.paint_set
    monkeypatch.setattr(data, "paint_set", lambda folder, size, **how: small(folder, size, 24, processes=1, **how))
    paintings = open_paintings(None, 32)
    assert np.bincount(paintings.labels).tolist() == [3] * 8 and "painted by data.py" in paintings.report()
    monkeypatch.setattr(data, "paint", None)
    assert np.array_equal(open_paintings(None, 32).images, paintings.images)


def test_the_shares_of_table_4_1(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "paint", lambda seed, label, size: np.full((size, size, 3), label, np.uint8))
    paintings = paint_set(tmp_path / "table", 8, 19_774 // 4, shares="table", processes=1)
    counts = np.bincount(paintings.labels)
    assert np.abs(counts - np.array(TABLE_4_1) / 4).max() <= 1 and counts.sum() == 19_774 // 4
    assert (paintings.images[:, 0, 0, 0] == paintings.labels).all()


# ---------------------------------------------------------------------------------------------------- letters from fonts


def test_letters_from_fonts(tmp_path, run, refused):
    fonts = tmp_path / "fonts"
    (fonts / "deep").mkdir(parents=True)
    face = ImageFont.load_default(20).font_bytes  # the font that Pillow brings along
    (fonts / "a.ttf").write_bytes(face)
    (fonts / "deep" / "b.TTF").write_bytes(face)
    (fonts / "c.otf").write_text("not a font")
    code, out, _ = run("data", "letters", "--fonts", fonts, "--out", tmp_path / "out")
    assert code == 0 and "26 letters of 1 fonts, 2 rejected" in out
    assert "1 the same letters as another font" in out and "1 not a font that can be drawn" in out
    letters = open_letters(tmp_path / "out")
    assert len(letters.images) == 26 and letters.classes == ALPHABET
    for image in letters.images[..., 0]:
        rows, columns = np.flatnonzero(image.any(1)), np.flatnonzero(image.any(0))
        assert max(np.ptp(rows), np.ptp(columns)) + 1 in (29, 30)  # the longer side; a faint rim may round to black
        assert abs(rows[0] + rows[-1] - 31) <= 1 and abs(columns[0] + columns[-1] - 31) <= 1  # centred
    tall = letters.images[ALPHABET.index("I"), ..., 0]
    assert tall.max() > 200 and tall.any(0).sum() < 12  # aspect kept: an I stays narrow
    assert "is not an empty folder" in refused("data", "letters", "--fonts", fonts, "--out", tmp_path / "out")
    assert "no fonts in it" in refused("data", "letters", "--fonts", tmp_path / "out", "--out", tmp_path / "new")


def test_fonts_without_letters_are_rejected(tmp_path, monkeypatch):
    (tmp_path / "fonts").mkdir()
    for name in "abcd":
        (tmp_path / "fonts" / f"{name}.ttf").write_bytes(ImageFont.load_default(20).font_bytes)
    glyph, faces = data.glyph, {}

    def odd(face, char):
        """The second font lacks Q, the third shows its box for Q, the fourth has the same picture for O and Q."""
        kind = faces.setdefault(id(face), (face, len(faces)))[1]
        instead = {1: None, 2: "\U0010fffe", 3: "O"}
        if char == "Q" and kind:
            return instead[kind] and glyph(face, instead[kind])
        return glyph(face, char)

    monkeypatch.setattr(data, "glyph", odd)
    reasons = letters_from_fonts(tmp_path / "fonts", tmp_path / "out")
    assert reasons == {"": 1, "blank letters": 1, "missing letters, drawn as .notdef": 1, "identical letters": 1}
    assert (tmp_path / "out" / "fonts.csv").read_text().splitlines()[2:] == [
        ",b.ttf,blank letters: Q",
        ',c.ttf,"missing letters, drawn as .notdef: Q"',
        ",d.ttf,identical letters: O and Q",
    ]
