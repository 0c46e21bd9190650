"""``layerwise bench kernels``: how fast the packed products are here."""

from __future__ import annotations

from typing import TYPE_CHECKING

from layerwise.cli import shared

if TYPE_CHECKING:
    from layerwise.kernels.measure import PeerRow


def bench_kernels(shapes: str, batches: str, rounds: int, json: bool) -> None:
    """Time the packed products; read by ``layerwise bench kernels``."""
    from dataclasses import asdict

    from layerwise.kernels.gpu import gpus
    from layerwise.kernels.gpu_measure import measure_gpu
    from layerwise.kernels.measure import BATCHES, SHAPES, measure

    progress = shared.Bar(quiet=json)
    matrices = tuple((pair[0], pair[1]) for pair in numbers(shapes, 2)) if shapes else SHAPES
    tokens = tuple(single[0] for single in numbers(batches, 1)) if batches else BATCHES
    found = measure(matrices, tokens, rounds, shown=progress.note)
    gpu = next(iter(gpus()), None)
    on_gpu = [] if gpu is None or gpu.decoded else measure_gpu(matrices, tokens, rounds, shown=progress.note)
    if json:
        shared.print_json({**found.as_dict(), "gpu": gpu and gpu.name, "gpu_rows": [asdict(row) for row in on_gpu]})
        return
    cache = "unknown" if found.cache_bytes is None else f"{found.cache_bytes / 2**20:.0f} MiB"
    shared.print_table(
        f"{found.processor}, path {found.path}, {found.threads} threads, torch {found.torch}; weights from memory: "
        f"a set of {found.set_bytes / 1e6:.0f} MB, last cache {cache}",
        (
            "form", "activations", "matrix", "batch", "median µs", "±", "packed bytes", "of reading", "fp32 ×",
            "bf16 ×", "best peer ×",
        ),
        [
            (
                row.form, row.activations, f"{row.rows} x {row.columns}", str(row.batch), f"{row.microseconds:.0f}",
                f"{row.spread:.0f}", f"{row.bytes:,}", f"{row.share:.0%}", f"{row.over_fp32:.2f}",
                f"{row.over_bf16:.2f}", best(found.over_peers(row)),
            )
            for row in found.rows
        ],
        numeric=(3, 4, 5, 6, 7, 8, 9, 10),
    )  # fmt: skip
    if found.peers:
        shared.print_table(
            "other engines, in the same rounds: " + ", ".join(f"{k} {v}" for k, v in found.versions.items()),
            ("engine", "activations", "matrix", "batch", "median µs", "±", "beside"),
            [
                (
                    peer.name,
                    peer.activations,
                    f"{peer.rows} x {peer.columns}",
                    str(peer.batch),
                    *peer_figures(peer),
                    peer.beside,
                )
                for peer in found.peers
            ],
            numeric=(3, 4, 5),
        )

    if gpu is not None and on_gpu:
        shared.print_table(
            f"{gpu.name}, from memory, with what calling from Python costs",
            ("form", "activations", "matrix", "batch", "median µs", "±", "packed bytes", "of reading", "dense ×"),
            [
                (
                    row.form, row.activations, f"{row.rows} x {row.columns}", str(row.batch),
                    f"{row.microseconds:.0f}", f"{row.spread:.0f}", f"{row.bytes:,}", f"{row.share:.0%}",
                    f"{row.over_dense:.2f}",
                )
                for row in on_gpu
            ],
            numeric=(3, 4, 5, 6, 7, 8),
        )  # fmt: skip


def best(ratios: dict[str, float]) -> str:
    """The ratio to the fastest peer; empty without one."""
    return f"{min(ratios.values()):.2f}" if ratios else ""


def peer_figures(peer: PeerRow) -> tuple[str, str]:
    if peer.microseconds is None or peer.spread is None:
        return peer.absent, ""
    return f"{peer.microseconds:.0f}", f"{peer.spread:.0f}"


def numbers(text: str, count: int) -> list[tuple[int, ...]]:
    """``4096x4096,11008x4096`` -> pairs, ``1,8`` -> single numbers."""
    from layerwise.errors import InputError

    found = []
    for piece in text.split(","):
        parts = piece.lower().split("x")
        if len(parts) != count or not all(part.strip().isdigit() for part in parts):
            wanted = "shapes are written 4096x4096,11008x4096" if count == 2 else "batches are written 1,8,32"
            raise InputError(f"{wanted}, not {text!r}")
        found.append(tuple(int(part) for part in parts))
    return found
