"""Everything that is drawn: grids of images, charts, films, and the figures that need no model.

    python plots.py sheet letters           some images of every label of a set (figs 4.1, 4.4)
    python plots.py relabel paintings       the two labelling rules compared (figs 4.2, 4.3)
    python plots.py time                    the table of time embeddings (fig. 4.5)
    python plots.py schedules               signal-to-noise ratio over t; the weights of the losses
    python plots.py losses runs/letters     the loss chart of a training run (5.2)
    python plots.py rows LDM=DIR GAN=DIR    chosen images of several models (fig. 5.8)

Only Pillow draws. A set is a name or a path, as for `data.open_set`.
"""

import argparse
import csv
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

import data
from data import COLOURS, UserError, label_distances, mean_colour, nearest_colour
from ddpm import SCHEDULES, Diffusion
from unet import timestep_embedding

INK, PAPER, RULE, GREY = (40, 40, 44), (255, 255, 255), (225, 225, 228), (150, 150, 156)
PALETTE = [(31, 98, 180), (214, 93, 14), (54, 140, 66), (150, 60, 160)]
font = ImageFont.load_default
LEFT, RIGHT, TOP = 148, 1760, 88  # the edges of a chart's plot, in pixels, at twice its size

# --------------------------------------------------------------------------------------------------
# Grids and films
# --------------------------------------------------------------------------------------------------


def grid(images, columns, names=None, scale=1, gap=2):
    """Images (N, H, W, 3) uint8 row by row as one picture. names: left of the rows."""
    height, width = (scale * side for side in images.shape[1:3])
    rows, text = -(-len(images) // columns), font(min(18, max(11, height // 3)))
    margin = 12 + int(max(text.getlength(name) for name in names)) if names else 0
    size = (margin + columns * (width + gap) + gap, rows * (height + gap) + gap)
    picture = Image.new("RGB", size, PAPER)
    pen = ImageDraw.Draw(picture)
    for i, image in enumerate(images):
        row, column = divmod(i, columns)
        tile = Image.fromarray(image).resize((width, height), Image.Resampling.NEAREST)
        picture.paste(tile, (margin + gap + column * (width + gap), gap + row * (height + gap)))
    for row, name in enumerate(names or []):
        y = gap + row * (height + gap) + height // 2
        pen.text((margin - 6, y), name, INK, text, anchor="rm")
    return picture


def join(pictures, columns=1, titles=None):
    """Pictures row by row as one picture, each below its title."""
    columns, top = min(columns, len(pictures)), 24 if titles else 0
    width = max(picture.width for picture in pictures)
    height = max(picture.height for picture in pictures) + top
    joined = Image.new("RGB", (columns * width, -(-len(pictures) // columns) * height), PAPER)
    pen = ImageDraw.Draw(joined)
    for i, picture in enumerate(pictures):
        x, y = i % columns * width, i // columns * height
        joined.paste(picture, (x, y + top))
        if titles:
            pen.text((x + picture.width // 2, y + 12), titles[i], INK, font(15), anchor="mm")
    return joined


def save(picture, path):
    """Write a picture, or a list of pictures as a film (GIF) that rests at its end and repeats."""
    with data.whole_file(path) as temporary:
        if isinstance(picture, list):
            first, *others = picture
            times = [70] * len(others) + [2500]  # milliseconds
            first.save(temporary, save_all=True, append_images=others, duration=times, loop=0)
        else:
            picture.save(temporary)


# --------------------------------------------------------------------------------------------------
# Charts
# --------------------------------------------------------------------------------------------------


def frame(height, title, names, mark, low, high, scale=float):
    """The frame of a chart: title, legend, and the ticks of the y axis from `low` to `high`.

    It has twice its final size: `reduce` then makes smooth lines. names: in the legend, each with
    a mark of `mark` pixels; scale: of the y axis, `float` or `np.log10`.
    Returns the picture, its pen, the colour of every name, and the function from a value to its y.
    """
    picture = Image.new("RGB", (1800, 2 * height), PAPER)
    pen, bottom = ImageDraw.Draw(picture), 2 * height - 104

    def y(value):
        return bottom - (bottom - TOP) * (scale(value) - scale(low)) / (scale(high) - scale(low))

    pen.text((LEFT, 44), title, INK, font(30), anchor="lm")
    for tick in linear_ticks(high, 5) if scale is float else log_ticks(low, high):
        pen.line((LEFT, y(tick), RIGHT, y(tick)), RULE, 2)
        pen.text((LEFT - 16, y(tick)), f"{tick:g}", INK, font(22), anchor="rm")
    colours = {"real": GREY} | dict(zip((n for n in names if n != "real"), PALETTE * len(names)))
    x = RIGHT
    for name in reversed(names):
        x -= font(24).getlength(name) + 80
        pen.line((x, 44, x + 36, 44), colours[name], mark)
        pen.text((x + 48, 44), name, INK, font(24), anchor="lm")
    return picture, pen, colours, y


def chart(lines, title, x_label, y_label):
    """A line chart with a logarithmic y axis.

    lines: name -> list of pieces (xs, ys). Pieces are not connected, so an interruption is a gap.
    Values that are not above 0, or not finite, are left out.
    """
    lines = {
        name: [[(x, y) for x, y in zip(*piece) if 0 < y < np.inf] for piece in pieces]
        for name, pieces in lines.items()
    }
    xs, ys = zip(*sum(sum(lines.values(), []), []) or [(1, 1)])  # (1, 1): for an empty chart
    low, high, x_max = min(ys) * 10**-0.03, max(ys) * 10**0.03, max(*xs, 1)
    picture, pen, colours, y = frame(460, title, list(lines), 6, low, high, np.log10)
    bottom, unit = y(low), (RIGHT - LEFT) / x_max
    for tick in linear_ticks(x_max, 6):
        x = LEFT + unit * tick
        pen.line((x, bottom, x, bottom + 8), INK, 2)
        pen.text((x, bottom + 28), f"{tick:,.0f}", INK, font(22), anchor="mm")
    for name, pieces in reversed(lines.items()):  # the first line is on top
        for piece in pieces:
            places = [(LEFT + unit * a, y(b)) for a, b in piece]
            pen.line(places, colours[name], 4, joint="curve")
            if len(places) == 1:
                pen.circle(places[0], 6, colours[name])
    pen.line((LEFT, TOP, LEFT, bottom, RIGHT, bottom), INK, 2)
    pen.text((RIGHT, bottom + 72), x_label, INK, font(24), anchor="rm")
    pen.text((LEFT, TOP - 16), y_label, INK, font(22), anchor="lm")
    return picture.reduce(2)


def bars(rows, value, title):
    """Figures 4.3 and 5.5 to 5.7: a bar chart with one group of bars per label, one bar per set.

    rows: dicts with "label", "set", the number `value`, and perhaps its standard error, named
    `value`_error. A value that is NaN has no bar, an error that is NaN no line.
    """
    rows = [row for row in rows if np.isfinite(row[value])]
    errors = [np.nan_to_num(row.get(f"{value}_error", 0.0)) for row in rows]
    labels, sets = (list(dict.fromkeys(row[key] for row in rows)) for key in ("label", "set"))
    high = 1.08 * max([row[value] + error for row, error in zip(rows, errors)] + [1e-9])
    picture, pen, colours, y = frame(350, title, sets, 22, 0, high)
    bottom, step = y(0), (RIGHT - LEFT) / max(1, len(labels))
    width = min(0.8 * step / max(1, len(sets)), 128)
    for row, error in zip(rows, errors):
        place = labels.index(row["label"]) + 0.5, sets.index(row["set"]) - len(sets) / 2
        x, top = LEFT + step * place[0] + width * place[1], y(max(0, row[value]))
        pen.rectangle((x + 2, min(top, bottom - 2), x + width - 2, bottom), colours[row["set"]])
        middle, reach = x + width / 2, bottom - y(error)
        if reach:
            pen.line((middle, top - reach, middle, min(bottom, top + reach)), INK, 2)
        if width > 48:
            pen.text((middle, top - reach - 14), f"{row[value]:.3g}", INK, font(18), anchor="mm")
    for i, label in enumerate(labels):
        x = LEFT + step * (i + 0.5)
        if label in COLOURS:  # a dot of that colour before its name
            x += 16
            edge = x - font(24).getlength(label) / 2
            pen.circle((edge - 26, bottom + 32), 10, COLOURS[label], outline=INK)
        pen.text((x, bottom + 32), label, INK, font(24), anchor="mm")
    pen.line((LEFT, bottom, RIGHT, bottom), INK, 2)
    return picture.reduce(2)


def log_ticks(low, high):
    """Powers of ten from `low` to `high`; finer ticks where these would be few."""
    decades = 10.0 ** np.arange(np.floor(np.log10(low)), np.ceil(np.log10(high)) + 1)
    finer = (3, (1, 2, 5)), (3, (1, 1.5, 2, 3, 4, 5, 6, 8)), (3, np.arange(10, 100) / 10)
    for enough, steps in ((6, (1,)), *finer):
        ticks = np.outer(decades, steps).flatten()
        ticks = ticks[(low <= ticks) & (ticks <= high)]
        if len(ticks) >= enough:
            break
    return ticks


def linear_ticks(high, count):
    """At most `count` + 1 round numbers from 0 to `high`."""
    power = 10 ** np.floor(np.log10(high / count))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= high / count)
    return np.arange(0, high + 1e-9, step)


def log_rows(path):
    """The rows of a log.csv as dicts of strings. A half-written last line is ignored."""
    *lines, _ = path.read_text().split("\n")
    return list(csv.DictReader(lines))


def curves(rows, column):
    """A column of a log.csv over the updates, one curve (xs, ys) until each interruption."""
    runs = {}
    for row in rows:
        if row[column]:
            xs, ys = runs.setdefault(row["run"], ([], []))
            xs.append(int(row["update"]))
            ys.append(float(row[column]))
    return list(runs.values())


def draw_losses(rows, path, loss_name=""):
    """5.2: the training and validation losses in the rows of a log.csv; interruptions are gaps."""
    lines = {"training": "train_loss", "validation": "validation_loss"}
    lines["validation, averaged weights"] = "validation_loss_ema"
    lines = {name: curves(rows, column) for name, column in lines.items()}
    save(chart(lines, "Loss", "update", loss_name), path)


# --------------------------------------------------------------------------------------------------
# Figures 4.1 to 4.5 and 5.8
# --------------------------------------------------------------------------------------------------


def picture_rows(rows, count, side=96):
    """A grid with one row per (name, images, numbers): `count` of the numbers, evenly picked."""
    tiles = np.full((len(rows), count, side, side, 3), 255, np.uint8)
    for row, (_, images, numbers) in zip(tiles, rows):
        for tile, i in zip(row, numbers[data.evenly(len(numbers), count)]):
            tile[:] = data.fit(images[i], side)
    return grid(tiles.reshape(-1, side, side, 3), count, [name for name, _, _ in rows])


def relabel(images):
    """4.2.2, the re-clustering: the label of every image by the RGB rule and by the LAB rule.

    images: (N, H, W, 3) uint8. Returns (rgb, lab, excess), each (N,). excess: how much farther, in
    Delta-E, the RGB label is than the LAB label.
    """
    means = data.threaded(lambda image: (mean_colour(image), mean_colour(image, "lab")), images)
    means = list(tqdm(means, "mean colours", len(images), unit="image", disable=None))
    in_rgb, in_lab = np.swapaxes(means, 0, 1)  # (N, 3) each
    rgb, lab = nearest_colour(in_rgb), nearest_colour(in_lab, "lab")
    distances, rows = label_distances(in_lab, "lab"), np.arange(len(images))
    return rgb, lab, distances[rows, rgb] - distances[rows, lab]


def transition_report(rgb, lab):
    """Both histograms, and how many images went from which RGB label to which LAB label."""
    table = np.bincount(8 * rgb + lab, minlength=64).reshape(8, 8)
    lines = [f"{'RGB':>22}{'LAB':>16}"]
    for name, a, b in zip(COLOURS, table.sum(1), table.sum(0)):
        lines.append(f"{name:8}{a:7,} {a / len(rgb):7.1%}{b:8,} {b / len(rgb):7.1%}")
    changed = f"{(rgb != lab).mean():.1%} of {len(rgb):,} labels"
    lines += [f"the LAB rule changes {changed}; from RGB (row) to LAB (column):", ""]
    lines.append(" " * 8 + "".join(f"{name:>8}" for name in COLOURS))
    for name, row in zip(COLOURS, table):
        lines.append(f"{name:8}" + "".join(f"{count:8,}" for count in row))
    return "\n".join(lines)


def time_embedding(steps, dim, scale=8):
    """Figure 4.5: `timestep_embedding` of t = 0 .. steps - 1, one column per time step.

    Orange is 1, white 0, blue -1. Fast waves are at the top of each half: they change most from one
    step to the next.
    """
    pe = timestep_embedding(torch.arange(steps), dim).T.numpy()[..., None]  # (dim, steps, 1)
    ends = np.where(pe > 0, np.float32([214, 93, 14]), np.float32([31, 98, 180]))
    table = Image.fromarray((255 + np.abs(pe) * (ends - 255)).round().astype(np.uint8))
    width, height, left, top = steps * scale, dim * scale, 64, 34
    picture = Image.new("RGB", (left + width + 20, top + height + 44), PAPER)
    picture.paste(table.resize((width, height), Image.Resampling.NEAREST), (left, top))
    texts = [
        (left, 17, f"Time embedding, {dim} entries: orange 1, white 0, blue -1", "lm"),
        (left - 10, top + 0.25 * height, "cos", "rm"),
        (left - 10, top + 0.75 * height, "sin", "rm"),
        (left + width, top + height + 32, "time step t", "rm"),
    ]
    for t in range(0, steps, max(1, steps // 8)):
        texts.append((left + (t + 0.5) * scale, top + height + 14, str(t), "mm"))
    pen = ImageDraw.Draw(picture)
    for x, y, text, anchor in texts:
        pen.text((x, y), text, "black", font(15), anchor=anchor)
    pen.line((left, top + height // 2, left + width, top + height // 2), "black", 2)
    return picture


# --------------------------------------------------------------------------------------------------
# Command line
# --------------------------------------------------------------------------------------------------


def parse():
    parser = argparse.ArgumentParser(description="Figures that need no model.")
    commands = parser.add_subparsers(required=True)

    def command(name, function, out, help):
        p = commands.add_parser(name, help=help)
        p.set_defaults(command=function)
        p.add_argument("--out", default=out, help=f"default {out}")
        return p.add_argument

    add = command("sheet", sheet_command, "sheet.png", "some images per label (figs 4.1, 4.4)")
    add("set", nargs="?", default="letters", help="as for training (default letters)")
    add("--each", type=int, default=8, help="images per label (default 8)")
    add("--size", type=int, help="open the set at this size (default: as it is)")
    about = "the two labelling rules compared (figs 4.2, 4.3); --out is a folder"
    add = command("relabel", relabel_command, "relabel", about)
    add("set", nargs="?", default="paintings", help="as for training (default paintings)")
    add("--size", type=int, default=256, help="pixels per side (default 256)")
    add = command("rows", rows_command, "rows.png", "images of several folders (fig. 5.8)")
    add("rows", nargs="+", metavar="NAME=DIR", help="name and folder of a row")
    add("--n", type=int, default=8, help="images per row, evenly picked (default 8)")
    add("--size", type=int, default=128, help="pixels per side of each (default 128)")
    command("time", time_command, "figures/figure_4_5.png", "table of time embeddings (fig. 4.5)")
    command("schedules", schedules_command, "schedules.png", "signal-to-noise ratios, loss weights")
    add = command("losses", losses_command, "loss.png", "losses of a run (5.2) or of several")
    add("runs", nargs="+", help="folders, such as runs/letters; of several, validation losses")
    return parser.parse_args()


def sheet_command(args):
    found = data.open_set(args.set, args.size, pack=False)
    members = [np.flatnonzero(found.labels == label) for label in range(len(found.classes))]
    rows = [(name, found.images, numbers) for name, numbers in zip(found.classes, members)]
    save(picture_rows(rows, args.each, min(96, *found.images[0].shape[:2])), args.out)


def relabel_command(args):
    images, out = data.open_set(args.set, args.size, labels="rgb").images, Path(args.out)
    if images.shape[3] == 1:
        raise UserError(f"{args.set}: its images are grey; the rules compare colours")
    rgb, lab, excess = relabel(images)
    print(transition_report(rgb, lab))
    rows = [
        {"label": label, "set": rule, "share": 100 * (labels == number).mean()}
        for rule, labels in (("RGB", rgb), ("LAB", lab))
        for number, label in enumerate(COLOURS)
    ]
    save(bars(rows, "share", f"Labels of {len(rgb):,} images, per cent"), out / "figure_4_3.png")
    rows, changes = [], Counter((a, b) for a, b in zip(rgb.tolist(), lab.tolist()) if a != b)
    for (a, b), _ in changes.most_common(8):  # the 8 images whose RGB label fits worst
        members = np.flatnonzero((rgb == a) & (lab == b))
        worst = members[np.argsort(-excess[members], kind="stable")][:8]
        rows.append((f"{list(COLOURS)[a]} > {list(COLOURS)[b]}", images, worst))
    if rows:
        save(picture_rows(rows, 8), out / "figure_4_2.png")


def rows_command(args):
    rows = []
    for item in args.rows:
        name, _, folder = item.partition("=")
        if not folder:
            raise UserError(f"{item}: expected NAME=DIR, such as LDM=samples/blue")
        images = data.open_set(folder, args.size, pack=False).images
        rows.append((name, images, np.arange(len(images))))
    save(picture_rows(rows, args.n, args.size), args.out)


def time_command(args):
    save(time_embedding(128, 64), args.out)


def schedules_command(args):
    """Two charts over t: the signal-to-noise ratio of the schedules, and the weights by which
    the losses of the linear one differ, see `Diffusion.loss_weights`."""
    all_t = list(range(1, 1001))
    tables = {name: Diffusion(schedule()) for name, schedule in SCHEDULES.items()}
    ratio = {name: [(all_t, d.loss_weights("eps").tolist())] for name, d in tables.items()}
    weights = {
        name: [(all_t, tables["linear"].loss_weights(name).tolist())]
        for name in ("eps", "x_0", "v", "flow")
    }
    title = "Signal-to-noise ratio alpha_bar / (1 - alpha_bar) of the schedules"
    losses = "Weight of the squared error of x_0 in four losses, linear schedule"
    save(join([chart(ratio, title, "t", ""), chart(weights, losses, "t", "")]), args.out)


def losses_command(args):
    logs = {}
    for run in args.runs:
        log = Path(run, "log.csv")
        logs[run] = rows = log_rows(log) if log.exists() else []
        if not rows:
            raise UserError(f"{log}: no such file, or no losses in it yet; train.py writes it")
    if len(logs) == 1:
        draw_losses(rows, args.out)
        return
    lines = {name: curves(rows, "validation_loss") for name, rows in logs.items()}
    save(chart(lines, "Validation loss, raw weights", "update", ""), args.out)


def main():
    args = parse()
    for name, least in (("each", 1), ("n", 1), ("size", 8)):
        if (value := getattr(args, name, None)) is not None and value < least:
            raise UserError(f"--{name} {value}: must be {least} or more")
    if args.command is not relabel_command:  # its --out is a folder
        data.check_picture_name(args.out)
    args.command(args)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    data.run_program(main)
