"""What the user asks for: precisions, how ranges are found, and which later stages run."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from typing import Any, NamedTuple

from .pair_requests import parse_selection
from .plan_requests import MODE_BITS, PlanRequest, parse_plan

CHOICES: dict[str, tuple[Any, ...]] = {
    "weight_bits": (4, 8),
    "weight_group": (0, 64, 128),
    "activation_bits": (4, 8, 16),
    "observer": ("minmax", "percentile", "mse"),
    "weights": ("nearest", "gptq", "adaround"),
    "step_sizes": ("observed", "learnt"),
    "equalise": ("off", "on"),
    "edges": ("a16", "a8"),
    "align_rounding": (False, True),
}
_COUNTS = {"learn_iterations": 0, "learn_samples": 1, "learn_batch": 1, "align_iterations": 0, "align_batch": 1}
_ALIGN = re.compile(r"none|accuquant:([1-9][0-9]{0,3})")
_CORRECT = re.compile(r"(none|ptqd|mmse|ner)(\+ibc(?:\+ivc)?)?(\+vsc)?")


class CorrectionRequest(NamedTuple):
    """A ``correct`` field in parts: the method for the output, and whether each of the others is corrected.

    ``input_bias`` and ``input_variance`` are of the latents that the next step receives.
    """

    output: str
    input_bias: bool
    input_variance: bool
    sampler_variance: bool

    @property
    def rolled_out(self) -> bool:
        """Whether it is estimated on rollouts that carry the earlier steps' corrections."""
        return self.output == "ner" or self.input_bias


@dataclass(frozen=True)
class Recipe:
    """A quantisation request; every field has the command line's name.

    Args:
        weight_bits: 4 or 8. The first and the last layer always have 8-bit weights.
        activation_bits: 4, 8 or 16; 16 keeps activations floating (integer weights).
        plan: "uniform"; "snr", "snr:THRESHOLD" or "snr:share=SHARE" (PTQD's rule; 20 % of the rows at A4);
            "budget:FRACTION" or "budget:FRACTION:MODES" (least final error; 1 is all A8, 0.5 all A4);
            "preset:NAME" (a published split); or the mode ("A4", "A8", "A16") of every row, noisiest step first.
        weights: how weights are rounded: "nearest" (with the scale of least output error per channel), "gptq" (each
            rounding error made good by the weights still to come) or "adaround" (learnt from there, block by block).
        weight_group: how many inputs of a linear layer share a weight scale, 64 or 128, where that divides their
            number; 0 for one scale per output.
        learn_iterations: of each block, with "adaround"; 0 learns nothing and leaves nearest rounding.
        learn_samples: how many inputs of the network "gptq" and "adaround" see, evenly from all rows, and no more than
            fit into 2 GiB between two layers. learn_batch: how many of them an iteration of "adaround" takes.
        learn_pairs: which they are: "every" for evenly drawn ones; or N that are selected, whatever ``learn_samples``:
            "uniform:N", "gaussian:N[:MEAN,DEVIATION]" or "density:N", see `calibration.selection`.
        step_sizes: of activations: "observed" (by the observer) or "learnt", with "adaround", in the same blocks as the
            rounding; quantisers of other bits than in a uniform plan of ``activation_bits`` keep what was observed.
        equalise: "on" divides the channels of activations by factors that the weights absorb, where a search finds that
            the layers' outputs gain from it; see `equalisation`.
        observer: how a range is read off the statistics: "minmax", "percentile" or "mse".
        rows: which rows share a range: "step" (none), "group:K" (K neighbours) or "static" (all).
        correct: what is done about the quantisation noise, see `qdiff_engine.correct`: "none", "ptqd", "mmse" or "ner"
            for the output, with "+ibc" (the latents' bias) or "+ibc+ivc" (and their variance) and "+vsc" (the sampler's
            variance) appended, in this order.
        align: "none", or "accuquant:M": step sizes learnt over groups of M steps, see `qdiff_engine.align`.
        align_iterations, align_batch, align_pairs, align_rounding: how that learns, see `AlignmentSettings`.
        edges: "a16" keeps the first layer's activations floating, "a8" quantises them to 8 bits.

    Raises:
        ValueError: a field has a value outside its choices; the message lists them.
    """

    weight_bits: int = 8
    activation_bits: int = 8
    plan: str | tuple[str, ...] = "uniform"
    weights: str = "nearest"
    weight_group: int = 0
    learn_iterations: int = 500
    learn_samples: int = 256
    learn_batch: int = 8
    learn_pairs: str = "every"
    step_sizes: str = "observed"
    observer: str = "mse"
    rows: str = "step"
    edges: str = "a16"
    correct: str = "none"
    equalise: str = "off"
    align: str = "none"
    align_iterations: int = 200
    align_batch: int = 4
    align_pairs: str = "every"
    align_rounding: bool = False

    def __post_init__(self) -> None:
        for name, choices in CHOICES.items():
            value = getattr(self, name)
            if value not in choices or type(value) is not type(choices[0]):
                raise ValueError(f"{name} must be one of {list(choices)}, got {value!r}")
        if isinstance(self.plan, list):
            object.__setattr__(self, "plan", tuple(self.plan))
        if isinstance(self.plan, tuple):
            wrong = sorted({str(mode) for mode in self.plan} - set(MODE_BITS))
            if wrong or not self.plan:
                raise ValueError(f"plan must name A4, A8 or A16 for every row, got {wrong or 'an empty plan'}")
        else:
            self.plan_request()
        for name, least in _COUNTS.items():
            value = getattr(self, name)
            if type(value) is not int or value < least:
                raise ValueError(f"{name} must be a whole number of at least {least}, got {value!r}")
        if self.step_sizes == "learnt" and self.weights != "adaround":
            raise ValueError(
                f"step_sizes 'learnt' needs weights 'adaround', whose blocks learn them, got {self.weights!r}"
            )
        if self.step_sizes == "learnt" and self.activation_bits == 16:
            raise ValueError(
                "step_sizes 'learnt' needs activation_bits 4 or 8, got 16: floating activations have no steps"
            )
        for name in ("learn_pairs", "align_pairs"):
            parse_selection(getattr(self, name), name)
        self.row_group()
        check_correct(self.correct)
        check_align(self.align)

    def plan_request(self) -> PlanRequest | None:
        """How the plan is to be found; None where the modes are given."""
        if isinstance(self.plan, tuple):
            return None
        if not isinstance(self.plan, str):
            raise ValueError(f"plan must be a name or a sequence of modes, got {self.plan!r}")
        return parse_plan(self.plan)

    def plan_to_measure(self) -> PlanRequest | None:
        """How the plan is to be found, where that depends on how the quantised network behaves; None elsewhere."""
        request = self.plan_request()
        return request if request is not None and request.measured else None

    def row_group(self) -> int:
        """How many neighbouring rows share one range; 0 means all of them."""
        if self.rows == "step":
            return 1
        if self.rows == "static":
            return 0
        kind, _, count = str(self.rows).partition(":")
        if kind != "group" or not re.fullmatch("[0-9]{1,9}", count) or int(count) < 1:
            raise ValueError(f"rows must be 'step', 'static' or 'group:K' with K >= 1, got {self.rows!r}")
        return int(count)

    @classmethod
    def named(cls, name: str, **changes: Any) -> Recipe:
        """The recipe called ``name``, with fields replaced by ``changes``."""
        if name not in NAMED:
            raise ValueError(f"recipe must be one of {', '.join(NAMED)}, got {name!r}")
        return cls.from_dict({**NAMED[name], **changes})

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Recipe:
        """A recipe from field names and values; unknown names raise with the list of valid ones."""
        fields = [f.name for f in dataclasses.fields(cls)]
        unknown = sorted(set(values) - set(fields))
        if unknown:
            raise ValueError(f"recipe has no field {', '.join(map(repr, unknown))}; valid are {', '.join(fields)}")
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, the inverse of `from_dict`."""
        values = dataclasses.asdict(self)
        values["plan"] = list(self.plan) if isinstance(self.plan, tuple) else self.plan
        return values


def check_align(value: Any) -> int | None:
    """M, how many consecutive steps are aligned together; None for "none".

    Raises:
        ValueError: it is neither form.
    """
    found = _ALIGN.fullmatch(value) if isinstance(value, str) else None
    if found is None:
        raise ValueError(f"align must be 'none' or 'accuquant:M' with M >= 1, got {value!r:.50}")
    return None if found[1] is None else int(found[1])


def check_correct(value: Any) -> CorrectionRequest:
    """The parts of a ``correct`` field.

    Raises:
        ValueError: it is none of the valid forms.
    """
    found = _CORRECT.fullmatch(value) if isinstance(value, str) else None
    if found is None:
        raise ValueError(
            f"correct must be none, ptqd, mmse or ner, with '+ibc' or '+ibc+ivc' and '+vsc' appended, got {value!r:.50}"
        )
    return CorrectionRequest(found[1], found[2] is not None, found[2] == "+ibc+ivc", found[3] is not None)


NAMED: dict[str, dict[str, Any]] = {
    "w8a8": {"weight_bits": 8, "activation_bits": 8},
    "w4a8": {"weight_bits": 4, "activation_bits": 8, "weights": "gptq"},
    "w4a4": {"weight_bits": 4, "activation_bits": 4, "weights": "gptq"},
    "w4a8-mixed": {"weight_bits": 4, "activation_bits": 8, "weights": "gptq", "plan": "budget:0.9:A4,A8"},
    "w8a16": {"weight_bits": 8, "activation_bits": 16},
    "w4a16": {"weight_bits": 4, "activation_bits": 16, "weights": "gptq"},
}
