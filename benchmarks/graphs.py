"""Captured and fused graphs of the benchmarked networks, kept between runs: capturing SDXL takes minutes.

python -m benchmarks.graphs FOLDER sd15 sdxl    writes FOLDER/sd15.json ...; needs no GPU, and memory for no weight
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from benchmarks import models
from qdiff_engine.graph.capture import Capture, capture
from qdiff_engine.graph.fuse import fuse
from qdiff_engine.graph.ir import from_json, to_json
from qdiff_engine.graph.operators import OPERATORS


def captured(unet: nn.Module, shape: tuple[int, ...], given: Mapping[str, Any], store: Path | None = None) -> Capture:
    """The fused graph of ``unet`` with its parameters: read from ``store`` if that is there, else made and kept there.

    Raises:
        ValueError: ``store`` is of another network.
    """
    if store is not None and store.exists():
        return _read(store, unet)
    made = capture(unet, shape, given)
    fuse(made.graph, made.constants)
    if store is not None:
        shapes = {key: list(value.shape) for key, value in made.constants.items()}
        unknown = sorted(set(shapes) - set(unet.state_dict()))
        if unknown:
            raise ValueError(f"the graph reads {unknown[0]}, which is no parameter; it cannot be kept")
        store.parent.mkdir(parents=True, exist_ok=True)
        document = {"config": made.config, "shapes": shapes, "graph": to_json(made.graph)}
        store.write_text(json.dumps(document) + "\n", encoding="utf-8")
    return made


def _read(store: Path, unet: nn.Module) -> Capture:
    document = json.loads(store.read_text(encoding="utf-8"))
    state = unet.state_dict()
    try:  # fusing changes the shape of a parameter, nothing else
        constants = {key: state[key].detach().reshape(shape) for key, shape in document["shapes"].items()}
    except (KeyError, RuntimeError) as error:
        raise ValueError(f"{store}: the graph of another network ({error}); delete it") from error
    return Capture(from_json(document["graph"], OPERATORS), constants, "random", document["config"])


def main(arguments: list[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("names", nargs="+", choices=models.NAMES)
    options = parser.parse_args(arguments)
    for name in options.names:
        unet, given = models.random_unet(name, fill=False), models.conditioning_of(name, 2)
        made = captured(unet, models.shape_of(name), given, options.folder / f"{name}.json")
        print(f"{options.folder / name}.json: {len(made.graph.nodes)} nodes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
