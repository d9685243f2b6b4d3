"""The two JSON files of an artifact: their fields, their canonical form, and the checks that strangers' files need."""

from __future__ import annotations

import contextlib
import hashlib
import math
import re
from collections.abc import Iterator
from typing import Any

import torch

from ..graph import ir
from ..recipe import Recipe, check_correct
from ..tables import MODES
from . import canonical_json
from .tensor_file import DTYPES as DTYPES

CONFIG, GRAPH, MODEL = "config.json", "graph.json", "model.safetensors"
SCHEMA_VERSION = 1
MAX_CONFIG, MAX_GRAPH = 16 * 2**20, 64 * 2**20
TABLE_FIELDS = {
    "scale": torch.float32,
    "zero_point": torch.int32,
    "bits": torch.uint8,
    "output_scale": torch.float32,
    "output_shift": torch.float32,
}
_FIELDS: dict[str, type] = {
    "schema_version": int,
    "engine_version": str,
    "recipe": dict,
    "key": dict,
    "model_config": dict,
    "plan": list,
    "sites": list,
    "output_channels": int,
    "weights": dict,
    "constants": dict,
}
_OPTIONAL: dict[str, dict[str, type]] = {  # present where noise was measured, and where corrections were estimated
    "correction": {"method": str, "key": dict, "size": list},
    "noise": {"modes": list, "key": dict},
}
_NAME = re.compile(r"[A-Za-z0-9_.\-]{1,200}")
_MAX_ELEMENTS = 2**48


class ArtifactError(ValueError):
    """An artifact cannot be used; the message names the file and the field."""


@contextlib.contextmanager
def naming(file: str | None) -> Iterator[None]:
    """Turn a ValueError of the block into an ArtifactError that begins with the file's name."""
    try:
        yield
    except ArtifactError:
        raise
    except ValueError as error:
        raise ArtifactError(f"{file}: {error}" if file else str(error)) from error


def checked_name(value: Any, where: str) -> str:
    """``value``, if it is the name of a layer, a site or a constant."""
    if not isinstance(value, str) or not _NAME.fullmatch(value):
        raise ArtifactError(f"{where} has the name {str(value)[:100]!a}: letters, digits, '_', '.' and '-' only")
    return value


def seal(config: dict[str, Any], digests: dict[str, str]) -> bytes:
    """The bytes of config.json: ``config`` with the digests of the other files and then its own."""
    own = hashlib.sha256(canonical_json.dump({**config, "sha256": digests})).hexdigest()
    return canonical_json.dump({**config, "sha256": {**digests, CONFIG: own}})


def parse_config(data: bytes) -> dict[str, Any]:
    """The configuration in ``data``, its digest and every field checked.

    Raises:
        ValueError: what is wrong, with the field's name.
    """
    config = canonical_json.parse(data)
    if not isinstance(config, dict):
        raise ValueError("must hold an object")
    _check_version(config)
    if canonical_json.dump(config) != data:
        raise ValueError(f"not in canonical form ({_difference(data, canonical_json.dump(config))})")
    digests = config.pop("sha256", None)
    if not isinstance(digests, dict) or set(digests) != {CONFIG, GRAPH, MODEL}:
        raise ValueError(f"field 'sha256' must hold the digests of {CONFIG}, {GRAPH} and {MODEL}")
    own = digests.pop(CONFIG)
    if own != hashlib.sha256(canonical_json.dump({**config, "sha256": digests})).hexdigest():
        raise ValueError(f"damaged, its SHA-256 without that field is not the one in 'sha256', {CONFIG!r}")
    check_fields(config)
    return {**config, "sha256": digests}


def check_fields(config: dict[str, Any]) -> None:
    """Raise ArtifactError unless ``config``, without its digests, has every field, and each has its form."""
    with naming(CONFIG):
        _check_version(config)
        for name in sorted((config.keys() ^ _FIELDS.keys()) - (config.keys() & _OPTIONAL.keys())):
            raise ValueError(f"field {name!a} is {'missing' if name in _FIELDS else 'unknown'}")
        for name, kind in _FIELDS.items():
            if type(config[name]) is not kind:
                raise ValueError(f"field {name!r} must be of type {kind.__name__}, got {config[name]!a:.100}")
        for name in ("key", "model_config"):
            with naming(f"{CONFIG}: field {name!r}"):
                canonical_json.check_plain(config[name])
        with naming(f"{CONFIG}: field 'recipe'"):
            Recipe.from_dict(config["recipe"])
        for name in sorted(config.keys() & _OPTIONAL.keys()):
            _check_optional(name, config[name])
        _check_plan(config["plan"])
        _check_sites(config["sites"])
        _check_shape([config["output_channels"]], "field 'output_channels'", (1,))
        for layer, parts in config["weights"].items():
            _check_weights(checked_name(layer, f"{CONFIG}: weights"), parts)
        for key, entry in config["constants"].items():
            _check_constant(checked_name(key, f"{CONFIG}: constants"), entry)


def _check_optional(name: str, entry: Any) -> None:
    """The fields of "correction" and of "noise"."""
    fields = _OPTIONAL[name]
    if type(entry) is not dict or set(entry) != set(fields):
        raise ValueError(f"field {name!r} must hold {' and '.join(map(repr, fields))}")
    for field, kind in fields.items():
        if type(entry[field]) is not kind:
            raise ValueError(f"field {name!r}.{field} must be of type {kind.__name__}, got {entry[field]!a:.100}")
    with naming(f"{CONFIG}: field {name!r}.key"):
        canonical_json.check_plain(entry["key"])
    if name == "correction":
        with naming(f"{CONFIG}: field 'correction'.method"):
            check_correct(entry["method"])
        _check_shape(entry["size"], "field 'correction'.size", range(4))
    else:
        modes = entry["modes"]
        if not modes or not all(isinstance(m, str) and m in MODES for m in modes) or len(set(modes)) < len(modes):
            raise ValueError(f"field 'noise'.modes must hold some of {', '.join(MODES)}, got {modes!a:.100}")


def dump_graph(graph: ir.Graph) -> bytes:
    """The bytes of graph.json: one line per node, so that two graphs can be compared line by line."""
    data = ir.to_json(graph)
    with naming(GRAPH):
        nodes = ",\n".join("  " + canonical_json.dump_line(node) for node in data["nodes"])
        inputs, output = canonical_json.dump_line(data["inputs"]), canonical_json.dump_line(data["output"])
    return f'{{\n "inputs": {inputs},\n "nodes": [\n{nodes}\n ],\n "output": {output}\n}}\n'.encode("ascii")


def parse_graph(data: bytes, operators: frozenset[str]) -> ir.Graph:
    """Inverse of `dump_graph`; raises ArtifactError for anything that `dump_graph` would not have written."""
    with naming(GRAPH):
        graph = ir.from_json(canonical_json.parse(data), operators)
        if list(graph.inputs)[:2] != ["sample", "timestep"]:
            raise ValueError(f"inputs must begin with sample and timestep, got {list(graph.inputs)[:2]}")
        again = dump_graph(graph)
        if again != data:
            raise ValueError(f"not in canonical form, or with an unknown field ({_difference(data, again)})")
    return graph


def _check_version(config: dict[str, Any]) -> None:
    version = config.get("schema_version")
    if type(version) is not int or version != SCHEMA_VERSION:
        raise ValueError(f"field 'schema_version' must be {SCHEMA_VERSION}, got {str(version)[:50]!a}")


def _check_plan(plan: list[Any]) -> None:
    if not plan:
        raise ValueError("field 'plan' has no rows")
    for i, row in enumerate(plan):
        if not isinstance(row, dict) or set(row) != {"timestep", "mode"}:
            raise ValueError(f"field 'plan'[{i}] must hold 'timestep' and 'mode'")
        if type(row["timestep"]) is not float or not math.isfinite(row["timestep"]):
            raise ValueError(f"field 'plan'[{i}].timestep must be a finite floating-point number")
        if not isinstance(row["mode"], str) or row["mode"] not in MODES:
            raise ValueError(f"field 'plan'[{i}].mode must be one of {', '.join(MODES)}, got {row['mode']!a:.50}")


def _check_sites(sites: list[Any]) -> None:
    for site in sites:
        checked_name(site, f"{CONFIG}: sites")
    if len(set(sites)) != len(sites):
        raise ValueError("field 'sites' holds a name twice")


def _check_weights(layer: str, parts: Any) -> None:
    if not isinstance(parts, list) or not parts:
        raise ValueError(f"weights of {layer!r} must be a list with an entry per segment")
    for i, entry in enumerate(parts):
        where = f"weights of {layer!r}, segment {i}"
        if not isinstance(entry, dict) or set(entry) != {"bits", "shape"}:
            raise ValueError(f"{where} must hold 'bits' and 'shape'")
        if type(entry["bits"]) is not int or entry["bits"] not in (4, 8):
            raise ValueError(f"{where}: bits must be 4 or 8, got {entry['bits']!a:.50}")
        _check_shape(entry["shape"], f"{where}: shape", (2, 4))
        if 0 in entry["shape"]:
            raise ValueError(f"{where}: shape {entry['shape']} is empty")


def _check_constant(key: str, entry: Any) -> None:
    where = f"constants entry {key!r}"
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape"}:
        raise ValueError(f"{where} must hold 'dtype' and 'shape'")
    if not isinstance(entry["dtype"], str) or entry["dtype"] not in DTYPES:
        raise ValueError(f"{where}: dtype must be one of {', '.join(DTYPES)}, got {entry['dtype']!a:.50}")
    _check_shape(entry["shape"], f"{where}: shape", range(9))


def _check_shape(shape: Any, where: str, ranks: Any) -> None:
    """A list of sizes whose product, zeros aside, cannot overflow anything."""
    if not isinstance(shape, list) or len(shape) not in ranks:
        raise ValueError(f"{where} must be a list of {' or '.join(map(str, ranks))} sizes, got {shape!a:.100}")
    if any(type(size) is not int or size < 0 for size in shape) or math.prod(max(1, s) for s in shape) > _MAX_ELEMENTS:
        raise ValueError(f"{where} must hold sizes of a tensor, got {shape!a:.100}")


def _difference(found: bytes, expected: bytes) -> str:
    """Where two texts part."""
    for i, (a, b) in enumerate(zip(found.splitlines(), expected.splitlines(), strict=False), start=1):
        if a != b:
            return f"line {i}: {a[:80].decode('ascii', 'replace')!a} should be {b[:80].decode('ascii')!a}"
    return "the number of lines differs"
