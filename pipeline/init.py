"""Copies a shipped recipe or training configuration into the current folder, to edit.

    winnow init                  lists the shipped files
    winnow init 400m             writes 400m.yaml
    winnow init demo             writes demo.yaml, train_demo.yaml and demo/ with the model and entries they name
    winnow init study            writes study.yaml and the train_demo.yaml that it names

Fails, and writes nothing, if the file or demo/ already exists. Keeps a train_demo.yaml that exists.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from trainer.errors import InputError
from trainer.terminal import entry_point

PACKAGE = Path(__file__).parent
DEMO_FILES = ("scorer", "entries.json")


def recipes() -> dict[str, Path]:
    """The shipped YAML files by name: `conf/` beside the package in a checkout, inside it in a wheel."""
    folder = next(place for place in (PACKAGE / "conf", PACKAGE.parent / "conf") if place.is_dir())
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def copy(name: str, folder: Path) -> list[Path]:
    """Copies the recipe `name` to a folder, with the files that it names. Returns the new files.

    Raises InputError, and writes nothing, if the name is unknown or a file already exists. Keeps a `train_demo.yaml`
    that exists, which both `demo` and `study` name.
    """
    shipped = recipes()
    if name not in shipped:
        raise InputError(f"no shipped recipe {name!r}; `winnow init` lists them")
    texts = {f"{name}.yaml": shipped[name]}
    if name in ("demo", "study") and not (folder / "train_demo.yaml").exists():
        texts["train_demo.yaml"] = shipped["train_demo"]
    data = DEMO_FILES if name == "demo" else ()
    targets = [*(folder / target for target in texts), *([folder / "demo"] if data else [])]
    if taken := [target for target in targets if target.exists()]:
        raise InputError(f"{taken[0]} already exists; nothing was written")
    folder.mkdir(parents=True, exist_ok=True)
    for file_name, template in texts.items():
        # In a checkout the demo's files lie inside the package.
        text = (
            template.read_text(encoding="utf-8").replace("pipeline/demo/", "demo/").replace("config: conf/", "config: ")
        )
        (folder / file_name).write_text(text, encoding="utf-8")
    for item in data:
        source, target = PACKAGE / "demo" / item, folder / "demo" / item
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(source, target) if source.is_dir() else shutil.copyfile(source, target)
    return targets


@entry_point
def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(
        prog="winnow init", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", nargs="?", help="the recipe, such as demo or 400m; without one, all are listed")
    parser.add_argument("--folder", type=Path, default=Path(), help="where to write it (default: here)")
    args = parser.parse_args(argv)
    if args.name is None:
        for name, path in recipes().items():
            first = path.read_text(encoding="utf-8").split("\n", 1)[0].lstrip("# ")
            print(f"{name:24}{first}")
        return
    for target in copy(args.name, args.folder):
        print(f"wrote {target}")
    if args.name == "demo":
        print("next: `winnow web runs/demo-web` in one terminal, `winnow run demo.yaml` in another")


if __name__ == "__main__":
    sys.exit(main())
