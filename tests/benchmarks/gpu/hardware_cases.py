"""Cases about the machine: versions, peak rates, matrix products and attention kernels at the student's shapes.

Figures that other cases are measured against: the matrix rate is the denominator of MFU, the copy rate bounds
everything elementwise, and the transfer rates bound the data path.
"""

import hashlib
import os
import subprocess
import sys
import time
from contextlib import nullcontext
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from tests.benchmarks.gpu.context import Context
from tests.benchmarks.gpu.timing import median_seconds

PACKAGES = ("torch", "transformers", "numpy", "pyarrow", "pydantic", "tokenizers", "safetensors", "triton")
SMI_FIELDS = "name,driver_version,clocks.sm,clocks.mem,power.limit,pcie.link.gen.current,pcie.link.width.current"
BACKENDS = ("default", "FLASH_ATTENTION", "CUDNN_ATTENTION", "EFFICIENT_ATTENTION")


def environment(context: Context) -> None:
    """Versions, GPU, chosen attention kernels, rates of disk and SHA-256."""
    context.record("python", sys.version.split()[0])
    context.record("packages", {name: _version(name) for name in PACKAGES})
    context.record("cpus", len(os.sched_getaffinity(0)))
    context.record("ld_library_path", os.environ.get("LD_LIBRARY_PATH"))
    _record_io_rates(context)
    if context.tiny:
        return
    context.record("cudnn", torch.backends.cudnn.version())
    context.record("memory_gb", torch.cuda.mem_get_info()[1] / 1e9)
    command = ["nvidia-smi", f"--query-gpu={SMI_FIELDS}", "--format=csv,noheader"]
    context.record("nvidia_smi", subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip())
    context.record("attention_choice", _attention_choice())


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "absent"


def _record_io_rates(context: Context) -> None:
    data, repeats = os.urandom(1 << 26), 2 if context.tiny else 16
    path = Path(context.work) / "disk"
    start = time.perf_counter()
    with path.open("wb") as file:
        for _ in range(repeats):
            file.write(data)
        file.flush()
        os.fsync(file.fileno())
    context.record("disk_write_gb_per_second", repeats * len(data) / (time.perf_counter() - start) / 1e9)
    path.unlink()
    start = time.perf_counter()
    hashlib.sha256(data).hexdigest()
    context.record("sha256_gb_per_second", len(data) / (time.perf_counter() - start) / 1e9)


def _attention_choice() -> dict[str, str]:
    """The kernel that scaled_dot_product_attention takes at our shapes (SDPBackend by name)."""
    query = torch.randn(8, 12, 512, 64, device="cuda", dtype=torch.bfloat16)
    mask = torch.ones(8, 1, 1, 512, device="cuda", dtype=torch.bool)
    choices = {
        "full": torch._fused_sdp_choice(query, query, query),
        "masked rows": torch._fused_sdp_choice(query[:, :, :77].contiguous(), query, query),
        "padded": torch._fused_sdp_choice(query, query, query, mask),
    }
    return {shape: SDPBackend(int(choice)).name for shape, choice in choices.items()}


def peak_rates(context: Context) -> None:
    """Largest matrix and copy rates, and transfers between host and GPU."""
    size, length = (256, 1 << 18) if context.tiny else (8192, 1 << 30)
    left, right = (torch.randn(size, size, device=context.device, dtype=torch.bfloat16) for _ in range(2))
    seconds = median_seconds(lambda: left @ right, context.device, repeats=20)
    context.record("matrix_tflops", 2 * size**3 / seconds / 1e12)
    source = torch.empty(length, device=context.device).normal_()
    target = torch.empty_like(source)
    seconds = median_seconds(lambda: target.copy_(source), context.device)
    context.record("copy_tb_per_second", 2 * source.nbytes / seconds / 1e12)
    if not context.tiny:
        del source, target
        _record_transfers(context)


def _record_transfers(context: Context) -> None:
    host = torch.empty(1 << 28, dtype=torch.uint8)
    device, pinned = host.cuda(), host.pin_memory()
    pairs = {
        "host_to_device_pinned": (pinned, device),
        "host_to_device_pageable": (host, device),
        "device_to_host_pinned": (device, pinned),
        "device_to_host_pageable": (device, host),
    }
    for name, (source, target) in pairs.items():
        copy = partial(target.copy_, source, non_blocking=True)
        seconds = median_seconds(copy, "cuda", repeats=5, warm_up=1)
        context.record(f"{name}_gb_per_second", len(host) / seconds / 1e9)


def matrix_products(context: Context) -> None:
    """TFLOP/s of the student's linear layers: forward, input gradient, weight gradient."""
    tokens = 256 if context.tiny else 131_072
    for inner, outer in ((768, 768), (768, 2304), (768, 3072), (3072, 768)):
        shapes = {"input": (tokens, inner), "weight": (outer, inner), "gradient": (tokens, outer), "bias": (outer,)}
        x = {name: torch.randn(shape, device=context.device, dtype=torch.bfloat16) for name, shape in shapes.items()}
        products = {
            "forward": partial(torch.addmm, x["bias"], x["input"], x["weight"].t()),
            "input gradient": partial(torch.mm, x["gradient"], x["weight"]),
            "weight gradient": partial(torch.mm, x["gradient"].t(), x["input"]),
        }
        flops = 2 * tokens * inner * outer
        rates = {name: flops / median_seconds(work, context.device) / 1e12 for name, work in products.items()}
        context.record(f"{inner} to {outer}, TFLOP/s", rates)


def attention(context: Context) -> None:
    """Forward and backward of every attention kernel, for all rows and for the masked rows of the last layer."""
    blocks, heads, length, width = (2, 2, 32, 8) if context.tiny else (256, 12, 512, 64)

    def random(rows: int) -> torch.Tensor:
        return torch.randn(
            blocks, rows, heads, width, device=context.device, dtype=torch.bfloat16
        ).transpose(1, 2).requires_grad_()  # fmt: skip

    mask = torch.ones(blocks, 1, 1, length, device=context.device, dtype=torch.bool)
    mask[:, :, :, -length // 8 :] = False
    for rows in (length, 5 if context.tiny else 77):
        inputs = (random(rows), random(length), random(length))
        gradient = torch.randn_like(inputs[0])
        flops = 14 * blocks * heads * rows * length * width  # two products forward, five backward
        for backend in BACKENDS:
            for label, attended in (("full", None), ("padded", mask)):
                name = f"{rows} query rows, {label}, {backend}"
                try:
                    seconds = median_seconds(partial(_attend, backend, inputs, attended, gradient), context.device)
                    context.record(name, {"ms": 1e3 * seconds, "tflops": flops / seconds / 1e12})
                except RuntimeError as error:  # a kernel that does not support these shapes
                    context.record(name, f"skipped: {str(error).strip().splitlines()[0][:160]}")


def _attend(backend: str, inputs: tuple[torch.Tensor, ...], mask: torch.Tensor | None, gradient: torch.Tensor) -> None:
    """One forward and backward; `backend` "default" leaves the choice to torch."""
    query, key, value = inputs
    with nullcontext() if backend == "default" else sdpa_kernel(getattr(SDPBackend, backend)):
        output = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    output.backward(gradient)  # type: ignore[no-untyped-call]
    for tensor in inputs:
        tensor.grad = None
