"""Section 4.2: pre-processing, sets of images, packing, and the pictures the project draws."""

import os

import numpy as np
import pytest
import torch
from PIL import Image

import data
from data import ALPHABET, UserError, chart, crop_and_resize, grid, open_letters, open_packed, to_tensor, to_uint8, whole_file

# ---------------------------------------------------------------------------------------------------- 4.2.3


def test_values_become_minus_one_to_one_and_back_exactly():
    values = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1)
    x = to_tensor(values)
    assert x.shape == (1, 3, 16, 16) and x.dtype == torch.float32
    assert x.min() == -1 and x.max() == 1
    assert torch.equal(x[:, 0], x[:, 1]) and torch.equal(x[:, 0], x[:, 2])  # grey as three equal channels (4.2.1)
    assert np.array_equal(to_uint8(x), values.repeat(3, axis=3))
    colour = np.random.default_rng(0).integers(0, 256, (2, 4, 4, 3), np.uint8)
    assert np.array_equal(to_uint8(to_tensor(colour)), colour)
    assert to_uint8(torch.tensor([-3.0, 3.0]).view(1, 1, 1, 2)).flatten().tolist() == [0, 255]


def test_crop_comes_before_resize_so_nothing_is_deformed():
    wide = np.zeros((40, 100, 3), np.uint8)
    wide[:, 30:70] = (0, 255, 0)  # exactly the centre square
    wide[10:30, 40:60] = (255, 0, 0)  # a square inside it
    small = np.asarray(crop_and_resize(Image.fromarray(wide), 20))
    assert small.shape == (20, 20, 3)
    red = small[..., 0] > 127
    assert red.any(0).sum() == red.any(1).sum() == 10  # still square
    assert np.all(small.astype(int).sum(-1) > 200)  # nothing from outside the crop
    tall = Image.fromarray(wide.transpose(1, 0, 2))
    turned = np.asarray(crop_and_resize(tall, 20)).transpose(1, 0, 2)
    assert np.abs(turned.astype(int) - small).max() < 8  # Pillow rounds between its two passes


def test_the_crop_is_the_centre_square_of_odd_sizes_too():
    """Without a resize the pixels are those of the box; of an odd rest, the smaller half goes left and above."""
    for width, height in ((7, 4), (4, 7), (8, 5), (5, 5), (1, 6), (31, 12)):
        pixels = np.arange(width * height * 3, dtype=np.uint32).astype(np.uint8).reshape(height, width, 3)
        side = min(width, height)
        left, top = [(rest - rest % 2) // 2 for rest in (width - side, height - side)]
        cropped = np.asarray(crop_and_resize(Image.fromarray(pixels), side))
        assert np.array_equal(cropped, pixels[top : top + side, left : left + side])


def lanczos_by_hand(pixels, size):
    """A square reduced along x, then along y: sinc(t) sinc(t / 3), |t| < 3, stretched by the factor; rounded after each."""
    factor = len(pixels) / size
    centres = (np.arange(size) + 0.5) * factor - 0.5
    t = (np.arange(len(pixels)) - centres[:, None]) / factor
    weights = np.where(np.abs(t) < 3, np.sinc(t) * np.sinc(t / 3), 0)
    weights /= weights.sum(1, keepdims=True)
    along_x = np.clip(np.floor(np.einsum("ij,yjc->yic", weights, pixels.astype(float)) + 0.5), 0, 255)
    return np.clip(np.floor(np.einsum("ij,jxc->ixc", weights, along_x) + 0.5), 0, 255)


def test_the_resize_against_plain_numpy():
    random = np.random.default_rng(0)
    for side, size in ((64, 16), (90, 32), (37, 12)):
        pixels = random.integers(0, 256, (side, side, 3), np.uint8)
        small = np.asarray(crop_and_resize(Image.fromarray(pixels), size)).astype(int)
        assert np.abs(small - lanczos_by_hand(pixels, size)).max() <= 1  # Pillow's weights have 22 bits: .5 may go either way
        assert (small == lanczos_by_hand(pixels, size)).mean() > 0.999


def test_a_constant_and_a_ramp_are_resized_exactly():
    constant = np.full((60, 77, 3), (12, 130, 255), np.uint8)
    assert (np.asarray(crop_and_resize(Image.fromarray(constant), 17)) == (12, 130, 255)).all()
    ramp = np.tile(np.arange(0, 256, 2, dtype=np.uint8), (128, 1))
    means = ramp.reshape(128, 32, 4).mean(2)[::4]  # of every block of four: 8 i + 3
    for turned, expected in ((ramp, means), (ramp.T, means.T)):
        small = np.asarray(crop_and_resize(Image.fromarray(turned), 32))
        assert np.array_equal(small[3:-3, 3:-3], expected[3:-3, 3:-3])  # at the border the filter is cut off


def test_resize_is_anti_aliased():
    lines = np.zeros((64, 64), np.uint8)
    lines[:, ::2] = 255
    small = np.asarray(crop_and_resize(Image.fromarray(lines), 16))
    assert np.abs(small[:, 2:-2].astype(int) - 127).max() < 20  # a grey, not a pattern of its own


# ---------------------------------------------------------------------------------------------------- letters


def test_embedded_letters():
    letters = open_letters()
    assert letters.images.shape == (10_400, 32, 32, 1) and letters.classes == ALPHABET
    assert np.bincount(letters.labels).tolist() == [400] * 26
    assert set(np.unique(letters.images)) == set(range(0, 256, 17))  # 16 grey levels
    assert (letters.images[:, [0, -1]] == 0).mean() > 0.9  # white on black
    train, validation = letters.split()
    assert len(validation) == 40 * 26 and letters.sources[validation].min() == 360  # the last 40 fonts
    assert set(letters.sources[train]).isdisjoint(letters.sources[validation])
    assert len((data.ASSETS / "letters_fonts.csv").read_text().splitlines()) == 401  # the credits, one font a row
    x, y = letters.batch(np.array([0, 27]))
    assert y.tolist() == [0, 1] and torch.equal(x[1], to_tensor(letters.images[27:28])[0])


def write_tree(root, classes=ALPHABET, count=3, size=32):
    random = np.random.default_rng(0)
    for name in classes:
        (root / name).mkdir(parents=True)
        for i in range(count):
            Image.fromarray(random.integers(0, 256, (size, size), np.uint8)).save(root / name / f"{i}.png")
    return root


def test_kaggle_tree_is_packed_once(tmp_path, monkeypatch):
    root = write_tree(tmp_path / "archive" / "Images" / "Images", count=12)
    letters = open_letters(tmp_path / "archive")
    assert letters.images.shape == (312, 32, 32, 1) and isinstance(letters.images, np.memmap)
    assert letters.classes == ALPHABET
    row = np.flatnonzero((letters.labels == 6) & (letters.sources == letters.sources[list(letters.labels).index(0) + 3]))
    assert len(row) == 1  # one image a class has the file name of that font
    png = np.asarray(Image.open(root / "G" / "0.png"))
    assert any(np.array_equal(image[..., 0], png) for image in letters.images[letters.labels == 6])
    train, validation = letters.split()
    assert len(validation) == 26 and len(np.unique(letters.sources[validation])) == 1  # a tenth of 12 fonts, at least one
    monkeypatch.setattr(data, "pack", None)  # the second time, nothing is decoded
    assert np.array_equal(open_letters(tmp_path / "archive").images, letters.images)


def test_a_changed_tree_is_packed_again(tmp_path):
    root = write_tree(tmp_path / "set", count=2)
    assert len(open_letters(root).images) == 52
    Image.new("L", (32, 32)).save(root / "K" / "new.png")
    os.utime(root / "K", ns=(1, 1))
    assert len(open_letters(root).images) == 53


def test_read_only_folders_are_packed_into_the_cache(tmp_path, monkeypatch):
    root = write_tree(tmp_path / "set", count=1)
    monkeypatch.setattr(data.os, "access", lambda path, mode: False)
    monkeypatch.setattr(data.Path, "home", lambda: tmp_path / "home")
    assert len(open_letters(root).images) == 26
    assert list(tmp_path.glob("set.packed*")) == [] and list((tmp_path / "home" / ".cache").rglob("images.npy"))


def test_any_folder_per_class_tree_and_colour(tmp_path):
    root = write_tree(tmp_path / "set", ["cat", "dog", "eel"], size=50)
    for i in range(3):
        Image.new("RGB", (70, 50), (200, 10, 0)).save(root / "dog" / f"{i}.png")
    pets = open_packed(root, 32)
    assert pets.classes == ["cat", "dog", "eel"] and pets.images.shape == (9, 32, 32, 3)
    assert (pets.images[pets.labels == 1] == (200, 10, 0)).all()


def test_letters_of_16_bits_are_scaled_not_clipped_and_turned_images_upright(tmp_path):
    values = np.arange(0, 256, 8, dtype=np.uint16).repeat(32).reshape(32, 32)
    for name in ("cat", "dog"):
        (tmp_path / "set" / name).mkdir(parents=True)
        Image.fromarray(values * 257).save(tmp_path / "set" / name / "0.png")
    letters = open_packed(tmp_path / "set", 32)
    assert letters.images.shape == (2, 32, 32, 1) and (letters.images[..., 0] == values).all()
    exif = Image.Exif()
    exif[0x0112] = 6  # turn clockwise to view
    Image.fromarray(np.rot90(values).astype(np.uint8)).save(tmp_path / "turned.png", exif=exif)
    assert np.array_equal(data.load_image(tmp_path / "turned.png", 32, "L")[..., 0], values)
    Image.fromarray(np.zeros((32, 32), np.float32)).save(tmp_path / "float.tif")
    with pytest.raises(UserError, match="float.tif: not an image that can be read .32-bit"):
        data.load_image(tmp_path / "float.tif", 32)


def test_npz_with_the_keys_of_the_kaggle_file(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (52, 32, 32), np.uint8)
    labels = np.tile(np.arange(26), 2)
    np.savez(tmp_path / "fonts.npz", images=images, labels=labels)
    letters = open_letters(tmp_path / "fonts.npz")
    assert np.array_equal(letters.images[..., 0], images) and letters.classes == ALPHABET
    assert np.array_equal(letters.sources, np.arange(52) // 26)  # the k-th image of every letter is from font k
    assert "52 images of 32 x 32, 26 classes" in letters.report()


def bad_sets(path):
    """name -> (what to open, words of the message)"""
    (path / "empty").mkdir()
    write_tree(path / "short", ALPHABET[:25], 1)
    (path / "short" / "notes.txt").write_text("x")
    root = write_tree(path / "broken", count=1)
    (root / "D" / "0.png").write_text("this is not an image")
    root = write_tree(path / "cut", count=1)
    png = (root / "D" / "0.png").read_bytes()
    (root / "D" / "0.png").write_bytes(png[: len(png) // 2])
    write_tree(path / "hollow", count=1)
    (path / "hollow" / "B" / "0.png").unlink()
    image, label = np.zeros((26, 32, 32), np.uint8), np.arange(26)
    np.savez(path / "keys.npz", pictures=image, labels=label)
    np.savez(path / "short.npz", images=image[:25], labels=label[:25])
    np.savez(path / "float.npz", images=image / 1.0, labels=label)
    np.savez(path / "far.npz", images=image, labels=label + 1)
    (path / "text.npz").write_text("not an archive")
    return {
        "nowhere": "no such file or folder",
        "empty": "no folders with images",
        "short": "25 classes, but the alphabet has 26; missing: Z",
        "broken": "0.png: not an image",
        "cut": "0.png: not an image",
        "hollow": "B: no images in it",
        "keys.npz": "no array images; it holds: pictures, labels",
        "short.npz": "25 classes",
        "float.npz": "expected uint8 images",
        "far.npz": "labels from 1 to 26",
        "text.npz": "not an .npz file",
    }


def test_bad_sets_are_one_clear_line_and_leave_nothing_behind(tmp_path, refused):
    for name, words in bad_sets(tmp_path).items():
        assert words in refused("data", "letters", "--data", tmp_path / name)
    assert [p for p in tmp_path.rglob("*") if "packed" in p.name] == []


def test_opening_reads_no_images(tmp_path):
    """A packed set is a memory map: 400,000 images open without being read (the file here is mostly a hole)."""
    small = write_tree(tmp_path / "big", count=1)
    open_packed(small, 32)
    folder = tmp_path / "big.packed32"
    np.save(folder / "labels.npy", np.arange(400_000) % 26)
    with open(folder / "images.npy", "wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": (400_000, 32, 32, 1)})
        file.truncate(file.tell() + 400_000 * 1024)
    big = open_packed(small, 32)
    assert len(big.images) == 400_000 and isinstance(big.images, np.memmap) and isinstance(big.labels, np.memmap)
    x, y = big.batch(np.array([399_999, 5]))
    assert (x == -1).all() and y.tolist() == [399_999 % 26, 5]
    assert os.stat(folder / "images.npy").st_blocks * 512 < 1_000_000


# ---------------------------------------------------------------------------------------------------- files, pictures


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


def test_grid_places_images_row_by_row():
    images = np.arange(6, dtype=np.uint8).repeat(4 * 4 * 3).reshape(6, 4, 4, 3) * 40
    picture = np.asarray(grid(images, 3, gap=1))
    assert picture.shape == (11, 16, 3)
    for i in range(6):
        row, column = divmod(i, 3)
        assert (picture[1 + 5 * row : 5 + 5 * row, 1 + 5 * column : 5 + 5 * column] == 40 * i).all()
    named = grid(images, 3, ["one", "two"])
    assert named.size[0] > 30


def test_chart_leaves_a_gap_where_a_run_was_interrupted():
    def columns_with_ink(pieces):
        picture = np.asarray(chart({"loss": pieces}, "", "", "")).astype(int)[60:400]
        return np.all(picture < (120, 160, 255), axis=-1).any(0).sum()

    whole = columns_with_ink([([0, 100], [1.0, 1.0])])
    interrupted = columns_with_ink([([0, 40], [1.0, 1.0]), ([60, 100], [1.0, 1.0])])
    assert 0.15 < 1 - interrupted / whole < 0.25


def test_too_little_memory_is_one_clear_line(capsys):
    for words in ("CUDA out of memory. Tried to allocate 2.00 GiB", "DefaultCPUAllocator: can't allocate memory"):

        def program(words=words):
            raise torch.OutOfMemoryError(words)

        with pytest.raises(SystemExit, match="2"):
            data.run_program(program)
        assert capsys.readouterr().err.startswith("error: not enough memory: a smaller --batch")
    with pytest.raises(RuntimeError, match="size mismatch"):
        data.run_program(lambda: torch.zeros(3, 3) @ torch.zeros(2))


def test_chart_leaves_out_what_a_logarithm_does_not_have():
    good = np.asarray(chart({"loss": [([0, 2], [1.0, 2.0])]}, "", "", ""))
    odd = chart({"loss": [([0, 1, 1, 1, 2], [1.0, 0.0, -1.0, float("inf"), 2.0])], "none": [([5], [float("nan")])]}, "", "", "")
    assert np.array_equal(np.asarray(odd)[60:], good[60:])


def test_what_shows_through_a_picture_is_white_paper(tmp_path):
    ink = np.zeros((32, 32, 2), np.uint8)
    ink[8:24, 8:24, 1] = 255  # black, and opaque only in the middle
    Image.fromarray(ink).save(tmp_path / "a.png")
    for mode in ("L", "RGB"):
        image = data.load_image(tmp_path / "a.png", 32, mode)
        assert (image[8:24, 8:24] == 0).all() and (image == 255).sum() == (32 * 32 - 16 * 16) * image.shape[2]
    with Image.open(tmp_path / "a.png") as opened:
        assert np.array_equal(image, np.asarray(data.on_paper(opened).convert("RGB")))


def test_fig_5_8_chosen_images_in_rows(tmp_path, run, refused):
    colours = {"LDM": (250, 0, 0), "GAN": (0, 0, 250)}
    for name, colour in colours.items():
        (tmp_path / name / "deep").mkdir(parents=True)
        for i in range(5):  # the red or blue channel says which, the green one which of them
            Image.new("RGB", (40, 40), (colour[0], 10 * i, colour[2])).save(tmp_path / name / "deep" / f"{i}.png")
    rows = [f"{name}={tmp_path / name}" for name in colours]
    code, out, err = run("data", "rows", *rows, "--n", 3, "--size", 32, "--out", tmp_path / "figure_5_8.png")
    assert code == 0, err
    picture = np.asarray(Image.open(tmp_path / "figure_5_8.png"))
    left = picture.shape[1] - 3 * 34 - 2
    for row, colour in enumerate(colours.values()):
        middles = picture[18 + 34 * row, left + 18 :: 34]
        assert middles.tolist() == [[colour[0], 10 * i, colour[2]] for i in (0, 2, 4)]  # evenly of five
    assert "no such folder" in refused("data", "rows", f"LDM={tmp_path / 'nowhere'}")
    assert "NAME=DIR" in refused("data", "rows", tmp_path / "LDM")
    (tmp_path / "empty").mkdir()
    assert "no images" in refused("data", "rows", f"LDM={tmp_path / 'empty'}")
    assert "not the name of a picture" in refused("data", "rows", *rows, "--out", tmp_path / "figure")


def test_tuning_for_a_cpu_keeps_float32_products_in_float32_and_leaves_other_devices_alone():
    matmul = torch.backends.mkldnn.matmul
    before = matmul.fp32_precision
    try:
        matmul.fp32_precision = "ieee"
        data.tune("cuda")
        assert matmul.fp32_precision == "ieee"
        data.tune("cpu")
        x = torch.randn((300, 500), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        error = ((x.float() @ x.float().T).double() - x @ x.T).abs().max()  # bfloat16 would miss by about 0.3
        assert error < 1e-3
    finally:
        matmul.fp32_precision = before


def test_fig_4_1_a_row_a_letter(tmp_path, run, refused):
    code, _, err = run("data", "letters", "--sheet", tmp_path / "figure_4_1.png")
    assert code == 0, err
    picture, letters = np.asarray(Image.open(tmp_path / "figure_4_1.png")), open_letters()
    left = picture.shape[1] - 16 * 34 - 2
    for label, place, which in ((0, 0, 0), (25, 15, -1)):
        row, x = np.flatnonzero(letters.labels == label)[which], left + 2 + 34 * place
        shown = picture[2 + 34 * label : 34 + 34 * label, x : x + 32]
        assert np.array_equal(shown, letters.images[row].repeat(3, -1))
    assert "not the name of a picture" in refused("data", "letters", "--sheet", tmp_path / "figure")
