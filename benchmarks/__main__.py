"""Run the benchmarks one after the other and put their tables into the documents.

``python -m benchmarks [NAME ...]``; the first run trains the models of the zoo.
"""

from __future__ import annotations

import argparse
import subprocess
import sys

SCRIPTS = {
    "demo": ("benchmarks.demo", "--record"),
    "encoder": ("benchmarks.encoder", "--record"),
    "decode": ("benchmarks.decode", "--record"),
    "decode-trained": ("benchmarks.decode", "--model", "trained", "--record"),
    "cost-model": ("benchmarks.cost_model", "--part", "decode", "--record"),
    "cost-model-prompt": ("benchmarks.cost_model", "--part", "prompt", "--record"),
    "kv-cache": ("benchmarks.kv_cache", "--record"),
    "runner": ("benchmarks.runner", "--record"),
    "generate": ("benchmarks.generate", "--record"),
    "mixed-decode": ("benchmarks.mixed_decode",),
    "int4-loss": ("benchmarks.int4_loss", "--record"),
    "compile-time": ("benchmarks.compile_time",),
    "onnx-writer": ("benchmarks.onnx_writer",),
    "onnx-kernels": ("benchmarks.onnx_kernels",),
    "manager": ("benchmarks.manager",),
    "big-model": ("benchmarks.big_model",),
    "formats-bytes": ("benchmarks.formats", "bytes"),
    "formats-kernels": ("benchmarks.formats", "kernels"),
    "drop": ("benchmarks.drop",),
    "bits": ("benchmarks.bits",),
    "relevance": ("benchmarks.relevance", "--record"),
    "coverage": ("benchmarks.coverage", "--record"),
    "faithfulness": ("benchmarks.faithfulness", "--record"),
    "quantizers-layers": ("benchmarks.quantizers", "--part", "layers", "--record"),
    "quantizers-loss": ("benchmarks.quantizers", "--part", "loss", "--record"),
    "quantizers-seconds": ("benchmarks.quantizers", "--part", "seconds", "--record"),
    "quantize-memory": ("benchmarks.quantize_memory", "--record"),
    "quantization": ("benchmarks.quantization",),
    "convolutions": ("benchmarks.convolutions", "--record"),
    "vit-bits": ("benchmarks.vit_bits", "--record"),
    "scores": ("benchmarks.scores", "--record"),
    "patching": ("benchmarks.patching", "--record"),
}


def main() -> int:
    """Run the benchmarks that are named, or all; each in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"among {', '.join(SCRIPTS)}")
    names = parser.parse_args().names or list(SCRIPTS)
    unknown = [name for name in names if name not in SCRIPTS]
    if unknown:
        parser.error(f"no benchmark {', '.join(unknown)}; there are {', '.join(SCRIPTS)}")
    for name in names:
        done = subprocess.run([sys.executable, "-m", *SCRIPTS[name]], check=False)
        if done.returncode:
            return done.returncode
    return subprocess.run([sys.executable, "-m", "benchmarks.readme"], check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
