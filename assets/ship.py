"""How trained models became those that come with the project: python assets/ship.py MODEL FILE

It keeps the averaged weights only, in half precision.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
import ldm  # noqa: E402
from data import UserError, run_program  # noqa: E402


def ship(model, path):
    """Write a model file. Of the folders in its settings, the last name stays."""

    def named(value):
        if isinstance(value, dict):
            return {name: named(part) for name, part in value.items()}
        return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value

    content = ldm.read_checkpoint(model)
    ema = {name: value.half() for name, value in content["weights"]["ema"].items()}
    shipped = {"settings": named(content["settings"]), "weights": {"ema": ema}}
    ldm.write_checkpoint(path, content | shipped)


def main():
    if len(sys.argv) != 3:
        raise UserError("expected a model file and the name of the file to write")
    ship(*sys.argv[1:])


if __name__ == "__main__":
    run_program(main)
