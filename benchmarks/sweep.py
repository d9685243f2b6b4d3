"""Kernels over a range of sizes, beside float16: from which size on integers win on this GPU, and by how much.

python -m benchmarks.sweep --device cuda    written to benchmarks/results/h200-sweep.json on an H200
"""

from __future__ import annotations

import sys

import torch

from benchmarks import gpu_sections, results_file


def main() -> int:
    """The command; exit status 1 where a section went wrong."""
    parser = results_file.arguments(__doc__, "<gpu>-sweep.json")
    results_file.device_arguments(parser, default="cuda")
    parser.add_argument("--repetitions", type=int, default=30, help="timed rounds")
    options = parser.parse_args()
    if options.device != "cuda":
        parser.error("the sweep is of GPU kernels; the CPU's are in python -m benchmarks.kernels")
    torch.manual_seed(0)
    return gpu_sections.main(options, "sweep", gpu_sections.sweep_sections)


if __name__ == "__main__":
    sys.exit(main())
