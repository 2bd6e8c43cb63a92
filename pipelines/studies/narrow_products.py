"""What the way of a product is worth in decoding: over all linear layers of a model, ``x Wᵀ``, ``W xᵀ`` and compiled.

    python -m pipelines.studies.narrow_products --model smollm2-135m --rows 1 2 4 8 16 32 64

A pass goes through every weight matrix once, so that none is found in a processor's cache where a decode step would not
find it; the ways take turns, and the median of the repeats counts. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from kvgauge.errors import UserError
from kvgauge.kernels.cpu.library import library
from kvgauge.kernels.cpu.narrow_product import narrow_product
from kvgauge.models.loading import load_model
from kvgauge.models.narrow_linear import transposed_product
from kvgauge.stage import fail

Product = Callable[[Tensor, Tensor], Tensor | None]

WAYS: dict[str, Product] = {"x Wᵀ": nn.functional.linear, "W xᵀ": transposed_product, "compiled": narrow_product}


@torch.no_grad()
def measure(model: PreTrainedModel, rows: Sequence[int], repeats: int) -> list[dict[str, float]]:
    """Seconds of a pass over all linear layers in every way, and the gain of each over ``x Wᵀ``, by number of rows.

    Raises:
        UserError: the kernels cannot be compiled here.
    """
    if library() is None:
        raise UserError("there are no compiled kernels here: install a C++ compiler and unset KVGAUGE_NATIVE")
    weights = [module.weight for module in model.modules() if isinstance(module, nn.Linear)]
    result = []
    for number in rows:
        inputs = {size: torch.randn(number, size, dtype=model.dtype) for size in {w.shape[1] for w in weights}}
        seconds: dict[str, list[float]] = defaultdict(list)
        for _ in range(repeats + 1):
            for name, product in WAYS.items():
                start = time.perf_counter()
                for weight in weights:
                    product(inputs[weight.shape[1]], weight)
                seconds[name].append(time.perf_counter() - start)
        median = {name: statistics.median(times[1:]) for name, times in seconds.items()}  # the first pass warms up
        gains = {f"gain of {name}": median["x Wᵀ"] / median[name] for name in WAYS if name != "x Wᵀ"}
        result.append({"rows": number} | median | gains)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description="Time of the linear layers' products, way by way.")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64])
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    try:
        model, _ = load_model(options.model, device="cpu")
        result = measure(model, options.rows, options.repeats)
    except UserError as error:
        fail(str(error))
    print(json.dumps({**vars(options), "threads": torch.get_num_threads(), "products": result}, ensure_ascii=False))


if __name__ == "__main__":
    main()
