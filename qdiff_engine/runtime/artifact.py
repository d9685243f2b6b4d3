"""The artifact: a folder of three files that holds everything a quantised model needs, safe to load from a stranger.

``config.json``        what the model is, in canonical form, and the SHA-256 of each file (its own: without that field)
``graph.json``         the integer graph, one node per line
``model.safetensors``  ``weight.LAYER.q0`` and ``.scale0`` (one pair per K segment), ``constant.KEY``, ``table.FIELD``,
                       and where they were estimated ``correction.FIELD`` and ``noise.FIELD``

The same calibration gives the same bytes. Other files in the folder are never read, but `save_artifact` refuses to
replace a folder that holds any.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..graph.factors import check_factors
from ..graph.ir import Graph
from ..recipe import Recipe
from ..tables import NOISE_SUMS, Correction, Noise, Table
from ..version import __version__
from ..weights import QuantizedWeight, scale_groups
from . import artifact_config, files
from .artifact_config import CONFIG, GRAPH, MODEL, TABLE_FIELDS, ArtifactError, naming
from .tensor_file import TensorSpec, read_tensors, write_tensors

CORRECTION_TENSORS = ("input_bias", "sigma_scale", "input_scale")
FILES = frozenset({CONFIG, GRAPH, MODEL})


@dataclass(frozen=True)
class Artifact:
    """A quantised model.

    Args:
        graph: the integer graph.
        weights: the quantised weights of every layer, one per K segment.
        constants: the tensors that the graph reads as they are, by key.
        table: scales, zero points and corrections of every calibrated row.
        recipe: what was asked for.
        key: what the corrections are valid for (model hash, scheduler, steps, eta, guidance, ...); plain JSON values.
        model_config: the UNet's own configuration; plain JSON values.
        correction, noise: what was estimated for the sampler, and measured of the quantisation noise, if anything.
        engine_version: the engine that made it.
    """

    graph: Graph
    weights: dict[str, tuple[QuantizedWeight, ...]]
    constants: dict[str, Tensor]
    table: Table
    recipe: Recipe
    key: dict[str, Any] = field(default_factory=dict)
    model_config: dict[str, Any] = field(default_factory=dict)
    correction: Correction | None = None
    noise: Noise | None = None
    engine_version: str = __version__

    @property
    def weight_shapes(self) -> dict[str, tuple[tuple[int, ...], ...]]:
        """Each layer's weight shapes, one per K segment."""
        return {layer: tuple(tuple(w.values.shape) for w in parts) for layer, parts in self.weights.items()}


def save_artifact(artifact: Artifact, folder: str | os.PathLike[str], operators: frozenset[str] | None = None) -> None:
    """Write ``artifact`` to ``folder``, whole or not at all; an artifact that is already there is replaced.

    Args:
        operators: names of the operators that the graph may contain; None means the engine's own list.

    Raises:
        ArtifactError: the artifact contradicts itself, and would not load again.
        FileExistsError: ``folder`` is a file, or holds anything but an artifact.
    """
    config = _describe(artifact)
    artifact_config.check_fields(config)
    graph = artifact_config.dump_graph(artifact.graph)
    artifact_config.parse_graph(graph, _operators(operators))
    check_agreement(artifact)
    with files.replace_folder(folder, FILES) as temporary:
        with open(temporary / MODEL, "xb") as file:
            digests = {GRAPH: hashlib.sha256(graph).hexdigest(), MODEL: write_tensors(file, _tensors(artifact))}
        (temporary / GRAPH).write_bytes(graph)
        (temporary / CONFIG).write_bytes(artifact_config.seal(config, digests))


def load_artifact(folder: str | os.PathLike[str], operators: frozenset[str] | None = None) -> Artifact:
    """Read and check the artifact in ``folder``, or the one that an interrupted save left as ``folder.previous``.

    The tensors are in memory of their own: replacing the files afterwards does not change the loaded model.

    Args:
        operators: names of the operators that the graph may contain; None means the engine's own list.

    Raises:
        ArtifactError: a file is missing, damaged, of another version, or holds something it must not; the message
            names the file and the field.
        OSError: the folder is not there or cannot be read.
    """
    with contextlib.ExitStack() as stack:
        with naming(None):
            opened = files.open_together(folder, FILES)
        for file in opened.values():
            stack.enter_context(file)
        with naming(CONFIG):
            config = artifact_config.parse_config(files.read_at_most(opened[CONFIG], artifact_config.MAX_CONFIG))
        with naming(GRAPH):
            text = files.read_at_most(opened[GRAPH], artifact_config.MAX_GRAPH)
            _check_digest(config, GRAPH, hashlib.sha256(text).hexdigest())
            graph = artifact_config.parse_graph(text, _operators(operators))
        with naming(MODEL):
            tensors, digest = read_tensors(opened[MODEL], _expected_tensors(config))
            _check_digest(config, MODEL, digest)
    artifact = _assemble(config, graph, tensors)
    check_agreement(artifact)
    return artifact


def check_agreement(artifact: Artifact) -> None:
    """Raise ArtifactError unless graph, weights, constants and table speak of the same layers, keys and sites."""
    _same_names("weights", "layer", set(artifact.weights), set(_layers(artifact.graph)))
    _same_names("constants", "key", set(artifact.constants), {k for n in artifact.graph.nodes for k in n.consts()})
    _same_names("sites", "site", set(artifact.table.sites), set(_sites(artifact.graph)))
    for node in artifact.graph.nodes:
        if node.kwargs.get("layer") is not None:
            _check_segments(node.name, node.kwargs.get("segments"), artifact.weights[node.kwargs["layer"]])
    for name, extra in (("correction", artifact.correction), ("noise", artifact.noise)):
        if extra is not None and tuple(extra.timesteps) != tuple(artifact.table.timesteps):
            raise ArtifactError(f"{CONFIG}: {name} has other rows than the plan")
    for key, value in artifact.constants.items():
        if value.is_floating_point() and bool(torch.isnan(value).any()):
            raise ArtifactError(f"{MODEL}: constant.{key} holds NaN")
    with naming(MODEL):
        check_factors(artifact.graph, artifact.constants)


def _layers(graph: Graph) -> Iterator[str]:
    """Values of the nodes' ``layer``."""
    for node in graph.nodes:
        layer = node.kwargs.get("layer")
        if layer is not None:
            yield artifact_config.checked_name(layer, f"{GRAPH}: node {node.name!r}: layer")


def _sites(graph: Graph) -> Iterator[str]:
    """Values of the nodes' ``site``: a name, or a list of names."""
    for node in graph.nodes:
        site = node.kwargs.get("site")
        for name in site if isinstance(site, tuple | list) else [site]:
            if name is not None:
                yield artifact_config.checked_name(name, f"{GRAPH}: node {node.name!r}: site")


def _same_names(field_name: str, kind: str, stored: set[str], read: set[str]) -> None:
    for name in sorted(stored ^ read):
        if name in read:
            raise ArtifactError(f"{CONFIG}: {field_name} lacks {name!r}, a {kind} that the graph reads")
        raise ArtifactError(f"{GRAPH}: no node reads the {kind} {name!r} of {field_name} in {CONFIG}")


def _check_segments(node: str, segments: Any, weights: tuple[QuantizedWeight, ...]) -> None:
    """``segments`` lists the input channels of each K segment; absent, there is one segment."""
    if segments is None:
        if len(weights) != 1:
            raise ArtifactError(f"{GRAPH}: node {node!r}: one segment, but the layer's weights have {len(weights)}")
        return
    channels = [w.values.shape[1] for w in weights]
    if not isinstance(segments, tuple | list) or list(segments) != channels:
        raise ArtifactError(f"{GRAPH}: node {node!r}: segments {segments!r}, but the weights have {channels} channels")


def _describe(artifact: Artifact) -> dict[str, Any]:
    """The configuration without the digests."""
    table, correction, noise = artifact.table, artifact.correction, artifact.noise
    optional: dict[str, Any] = {}
    if correction is not None:
        optional["correction"] = {
            "method": correction.method,
            "key": correction.key,
            "size": list(correction.input_bias.shape[2:]),
        }
    if noise is not None:
        optional["noise"] = {"modes": list(noise.modes), "key": noise.key}
    return optional | {
        "schema_version": artifact_config.SCHEMA_VERSION,
        "engine_version": artifact.engine_version,
        "recipe": artifact.recipe.to_dict(),
        "key": artifact.key,
        "model_config": artifact.model_config,
        "plan": [{"timestep": float(t), "mode": m} for t, m in zip(table.timesteps, table.modes, strict=True)],
        "sites": list(table.sites),
        "output_channels": table.output_scale.shape[1],
        "weights": {
            layer: [{"bits": w.bits, "shape": list(w.values.shape)} for w in parts]
            for layer, parts in artifact.weights.items()
        },
        "constants": {
            key: {"dtype": str(value.dtype).removeprefix("torch."), "shape": list(value.shape)}
            for key, value in artifact.constants.items()
        },
    }


def _tensors(artifact: Artifact) -> dict[str, Tensor]:
    """Every tensor under its name in the file; the prefixes keep a layer from colliding with a constant."""
    tensors = {f"table.{name}": getattr(artifact.table, name) for name in TABLE_FIELDS}
    tensors.update({f"constant.{key}": value for key, value in artifact.constants.items()})
    if artifact.correction is not None:
        tensors |= {f"correction.{name}": getattr(artifact.correction, name) for name in CORRECTION_TENSORS}
    if artifact.noise is not None:
        tensors["noise.sums"], tensors["noise.alpha_bar"] = artifact.noise.sums, artifact.noise.alpha_bar
    for layer, parts in artifact.weights.items():
        for i, weight in enumerate(parts):
            tensors[f"weight.{layer}.q{i}"] = weight.stored()
            tensors[f"weight.{layer}.scale{i}"] = weight.scale
    return tensors


def _expected_tensors(config: dict[str, Any]) -> dict[str, TensorSpec]:
    """What `_tensors` must have written for this configuration."""
    rows, channels = len(config["plan"]), config["output_channels"]
    widths = {"output_scale": config["output_channels"], "output_shift": config["output_channels"]}
    expected = {
        f"table.{name}": TensorSpec(dtype, (rows, widths.get(name, len(config["sites"]))))
        for name, dtype in TABLE_FIELDS.items()
    }
    if "correction" in config:
        shapes = dict.fromkeys(CORRECTION_TENSORS, (rows,)) | {
            "input_bias": (rows, channels, *config["correction"]["size"])
        }
        expected |= {f"correction.{name}": TensorSpec(torch.float32, shape) for name, shape in shapes.items()}
    if "noise" in config:
        modes = len(config["noise"]["modes"])
        expected["noise.sums"] = TensorSpec(torch.float64, (modes, rows, channels, NOISE_SUMS))
        expected["noise.alpha_bar"] = TensorSpec(torch.float64, (rows,))
    for key, entry in config["constants"].items():
        expected[f"constant.{key}"] = TensorSpec(artifact_config.DTYPES[entry["dtype"]], tuple(entry["shape"]))
    for layer, parts in config["weights"].items():
        for i, entry in enumerate(parts):
            n, k = entry["shape"][0], math.prod(entry["shape"][1:])
            packed = TensorSpec(torch.uint8, (n, (k + 1) // 2))
            expected[f"weight.{layer}.q{i}"] = packed if entry["bits"] == 4 else TensorSpec(torch.int8, (n, k))
            groups = scale_groups(entry["shape"], config["recipe"].get("weight_group", 0))
            scales = (n,) if groups == 1 else (n, groups)
            expected[f"weight.{layer}.scale{i}"] = TensorSpec(torch.float32, scales)
    return expected


def _assemble(config: dict[str, Any], graph: Graph, tensors: dict[str, Tensor]) -> Artifact:
    weights = {}
    for layer, parts in config["weights"].items():
        loaded = []
        for i, entry in enumerate(parts):
            with naming(f"{MODEL}: weight.{layer}.q{i} and .scale{i}"):
                name = f"weight.{layer}"
                stored, scale = tensors.pop(f"{name}.q{i}"), tensors.pop(f"{name}.scale{i}")
                loaded.append(QuantizedWeight.from_stored(stored, scale, entry["bits"], tuple(entry["shape"])))
        weights[layer] = tuple(loaded)
    return Artifact(
        graph=graph,
        weights=weights,
        constants={key: tensors[f"constant.{key}"] for key in config["constants"]},
        table=_assemble_table(config, tensors),
        recipe=Recipe.from_dict(config["recipe"]),
        key=config["key"],
        model_config=config["model_config"],
        correction=_assemble_correction(config, graph, tensors),
        noise=_assemble_noise(config, tensors),
        engine_version=config["engine_version"],
    )


def _assemble_table(config: dict[str, Any], tensors: dict[str, Tensor]) -> Table:
    try:
        return Table(
            timesteps=tuple(row["timestep"] for row in config["plan"]),
            modes=tuple(row["mode"] for row in config["plan"]),
            sites=tuple(config["sites"]),
            **{name: tensors[f"table.{name}"] for name in TABLE_FIELDS},
        )
    except ValueError as error:  # begins with the field's name
        of_tensors = str(error).split()[0] in TABLE_FIELDS
        raise ArtifactError(f"{MODEL}: table.{error}" if of_tensors else f"{CONFIG}: plan: {error}") from error


def _assemble_correction(config: dict[str, Any], graph: Graph, tensors: dict[str, Tensor]) -> Correction | None:
    if "correction" not in config:
        return None
    size, own = config["correction"]["size"], list(graph.inputs["sample"][2:])
    if size not in ([], own):
        raise ArtifactError(
            f"{CONFIG}: field 'correction'.size must be [] or {own} like the graph's sample, got {size}"
        )
    rows = tuple(row["timestep"] for row in config["plan"])
    parts = (tensors[f"correction.{name}"] for name in CORRECTION_TENSORS)
    with naming(f"{MODEL}: correction"):
        return Correction(config["correction"]["method"], config["correction"]["key"], rows, *parts)


def _assemble_noise(config: dict[str, Any], tensors: dict[str, Tensor]) -> Noise | None:
    if "noise" not in config:
        return None
    rows, entry = tuple(row["timestep"] for row in config["plan"]), config["noise"]
    with naming(f"{MODEL}: noise"):
        return Noise(entry["key"], rows, tuple(entry["modes"]), tensors["noise.sums"], tensors["noise.alpha_bar"])


def _check_digest(config: dict[str, Any], name: str, digest: str) -> None:
    if config["sha256"][name] != digest:
        raise ArtifactError(f"{name}: damaged, its SHA-256 is not the one in {CONFIG}, field 'sha256'")


def _operators(operators: frozenset[str] | None) -> frozenset[str]:
    if operators is None:
        from ..graph.operators import OPERATORS

        return OPERATORS
    return operators
