"""Run every command of README.md and docs/*.md, in their order, in a new folder:

    python tests/commands.py

A command is a line of a fenced `sh` block, or a whole fenced `python` block. Each runs once. What
the reader brings is made here, and small: folders of images, published files, a second machine.
`SHORTER` makes long commands short. A line runs as it stands if its comment is a time in seconds
("# 15 s"). A command that is one of our programs runs in a fork of this process, which has imported
everything: that saves seconds per command. Left out: the bare `pytest` and `python tests/...`.
"""

import os
import re
import runpy
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

from PIL import Image, ImageFont

ROOT = Path(__file__).parent.parent
LETTERS = "--updates 2 --channels 16 --multipliers 1 1 --overfit 26"
LATENT = "--updates 2 --channels 32 --multipliers 1 1"
SHORTER = (  # the first pattern that a command contains -> flags that make it short
    (r"--(help|reconstruct|prior)\b", ""),
    (r"--bound", "--n 1"),
    (r"--ode", "--n 1 --steps 2"),
    (r"--resume", "--updates 3"),
    (r"--init", "--updates 2 --size 64"),
    (r"--condition label", LATENT),
    (r"--condition palette", f"{LATENT} --T 2"),
    (r"--condition attention", LETTERS.replace("--channels 16", "--channels 32")),
    (r"--stage letters$", LETTERS),  # `sample.py` needs the T of `runs/letters` and `runs/ldm`
    (r"--stage letters", f"{LETTERS} --T 2"),
    (r"--stage ldm$", LATENT),
    (r"--stage classifier", LETTERS),
    (r"--stage vqgan(?!.*(--size|letters))", "--updates 2 --size 64"),  # also that of `--stage ldm`
    (r"--model thesis", f"{LATENT} --T 2 --channels 64 --batch 2 --size 64"),
    (r"--stage ldm", f"{LATENT} --T 2"),
    (r"train\.py", "--updates 2"),
    (r"sample\.py.* --per-label", "--steps 2 --per-label 2"),
    (r"sample\.py", "--steps 2"),
    (r"plots\.py \w+ paintings", "--size 64"),
    (r"--count", "--count 8"),
    (r"make_letters_classifier", "1"),
)


def commands():
    """command -> its comment: every line of the fenced sh blocks, and every fenced python block."""
    found = {}
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        for kind, block in re.findall(r"^```(\w+)\n(.*?)^```", page.read_text(), re.M | re.S):
            if kind == "python":
                found[f"python - <<'END'\n{block}END"] = ""
                continue
            for line in re.sub(r"\\\n *", "", block).splitlines():
                command, _, comment = line.partition(" # ")
                command = command.strip().removeprefix("pip install -r requirements.txt && ")
                found.setdefault(command, comment)
    return found


def adapted(command, comment):
    """The command, made short unless its comment says that it takes seconds."""
    if not re.match(r"\d+ s\b", comment):
        more = [flags for pattern, flags in SHORTER if re.search(pattern, command)]
        command = " ".join([command, *more[:1]])
    if "--nnodes 2" in command:  # two machines: here both are this one
        with socket.create_server(("localhost", 0)) as free:
            command = command.replace("HOST:29500", f"localhost:{free.getsockname()[1]}")
        command = command.replace("--nproc-per-node 4", "--nproc-per-node 1")
        command = f"{command} & {command} && wait $!"
    return command.replace("torchrun --nproc", "torchrun --standalone --nproc")


def make_images(folder):
    """Paintings by style and by colour, letters as in the Kaggle set, a font."""
    from data import ALPHABET, COLOURS, embedded_letters, paint

    images = {f"{name}.jpg": paint(0, label, 300) for label, name in enumerate("ab")}
    styles = ("Abstract_Expressionism", "Color_Field_Painting", "Minimalism", "Action_painting")
    letters = embedded_letters().images[..., 0]
    for k in range(6):
        images |= {f"wikiart/{style}/{style}-{k}.png": paint(k, k, 128) for style in styles}
        for label, name in enumerate(COLOURS):
            images[f"DIR/{name}/{k}.png"] = paint(k, label, 128)
    for font in range(12):
        for label, name in enumerate(ALPHABET):
            images[f"PATH/Images/Images/{name}/{font}.png"] = letters[26 * font + label]
    for name, image in images.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / name)
    (folder / "fonts").mkdir()
    (folder / "fonts" / "default.ttf").write_bytes(ImageFont.load_default(96).font_bytes)


def make_published_files(folder):
    """Small files in the published form, and their families in the copy of ldm.py."""
    import torch
    from conftest import lightning_file
    from test_ldm import FAMILIES, SMALL_STAGE, published

    import ldm
    from vqgan import VQGAN, Codebook

    states = {"cin": published()}
    for name in ("vq-f4", "vq-f8"):
        torch.manual_seed(0)
        states[name] = VQGAN(**SMALL_STAGE, bottleneck=Codebook(24, 4)).state_dict()
    for name, state in states.items():
        (folder / name).mkdir()
        lightning_file(folder / name / "model.ckpt", state)
    with (folder / "ldm.py").open("a") as file:
        for table, rows in FAMILIES.items():
            file.write(f"{table} |= {rows}\n")  # for torchrun
            getattr(ldm, table).update(rows)  # for `forked`


SHORTENED = {  # in the copies of the programs
    "data.py": ("count=2000, seed=0", "count=160, seed=0"),
    "train.py": ("(6, 50) if final else (4, 20)", "(1, 2)"),
}


def shorten(folder):
    """Paint fewer pictures, and draw fewer of them in previews."""
    for name, (whole, short) in SHORTENED.items():
        text = (folder / name).read_text()
        assert whole in text
        (folder / name).write_text(text.replace(whole, short))


def forked(program, *arguments):
    """Exit code of `python PROGRAM ARGUMENTS` in a fork of this process. Output goes to `log`."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    code = 1
    try:
        log = os.open("log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1)
        os.dup2(log, 2)
        sys.argv = [program, *arguments]
        runpy.run_path(program, run_name="__main__")
        code = 0
    except SystemExit as end:
        code = end.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def run(command):
    """The exit code of a command in this folder. Its output goes to the file `log`."""
    ours = re.fullmatch(r"python (\w+\.py [^|&<>$*;]*)", command)
    if ours:
        return forked(*shlex.split(ours[1]))
    with open("log", "w") as log:
        return subprocess.run(["bash", "-c", command], stdout=log, stderr=log).returncode


def main():
    failed = 0
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    with tempfile.TemporaryDirectory() as folder:
        hidden = shutil.ignore_patterns(".*", "runs", "figures", "__pycache__")
        shutil.copytree(ROOT, folder, ignore=hidden, dirs_exist_ok=True)
        os.chdir(folder)
        os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported
        os.environ["XDG_CACHE_HOME"] = f"{folder}/cache"
        shorten(Path(folder))
        sys.path[:0] = [folder, f"{folder}/tests"]
        make_images(Path(folder))
        make_published_files(Path(folder))
        import train  # noqa: F401  and with it every other module, for `forked`

        for command, comment in commands().items():
            if command == "pytest" or "python tests/" in command:
                continue
            command, start = adapted(command, comment), time.perf_counter()
            code = run(command)
            verdict = f"FAILED\n{Path('log').read_text()[-2000:]}" if code else "ok"
            print(f"{time.perf_counter() - start:5.0f} s  {command}  {verdict}", flush=True)
            failed += code != 0
        os.chdir(ROOT)
    print(f"{failed} failed" if failed else "all of them end as they should")
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
