"""Make the file of a model that comes with the project: averaged weights only, in half precision.

python assets/ship.py RUN FILE
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
import data
import ldm


def ship(run, path):
    """Write the model of a run folder or model file. Of the folders in its settings, the last name
    stays."""

    def named(value):
        if isinstance(value, dict):
            return {name: named(part) for name, part in value.items()}
        return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value

    content = ldm.read_checkpoint(Path(run, "model.pt") if Path(run).is_dir() else run)
    ema = {name: value.half() for name, value in content["weights"]["ema"].items()}
    shipped = {"settings": named(content["settings"]), "weights": {"ema": ema}}
    ldm.write_checkpoint(path, content | shipped)


if __name__ == "__main__":
    data.run_program(lambda: ship(*sys.argv[1:]))
