"""The compiled library: finding it, choosing a path through it, and its C interface.

``paths()`` are the instruction sets that it was compiled for and this processor has, best first; the first is taken
unless the environment variable ``LAYERWISE_KERNELS`` names another, or ``off`` for torch's reference everywhere. Where
the library was not built (no compiler at installation) or is of another version, there are no paths, and the first
product that would have used one says so in one warning.
"""

from __future__ import annotations

import ctypes
import os
import sys
import warnings
from functools import cache
from pathlib import Path

from layerwise.errors import InputError, nearest

VARIABLE = "LAYERWISE_KERNELS"
OFF = "off"
VERSION = 6  # of the C interface
LARGEST_KEPT = 31 << 20  # glibc's own limit is 32 MiB
KNOWN_PATHS = ("avx512", "avx2", "neon-dot", "neon", "portable")


class Stored(ctypes.Structure):
    """A matrix in its stored form, as ``native/parts.h`` declares it."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("rows", "columns", "bits", "planes", "group")),
        *((name, ctypes.c_int64) for name in ("trits", "scale_kind", "zero_kind", "centre")),
        ("codes", ctypes.c_void_p), ("codes_bytes", ctypes.c_int64),
        ("scale", ctypes.c_void_p), ("scale_bytes", ctypes.c_int64),
        ("zero", ctypes.c_void_p), ("zero_bytes", ctypes.c_int64),
        ("factor", ctypes.c_void_p), ("levels", ctypes.c_void_p), ("values", ctypes.c_void_p),
    ]  # fmt: skip


class SparseStored(ctypes.Structure):
    """A matrix of which some entries are kept, as ``native/layout.h`` declares it."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("rows", "columns", "words", "kind", "bits", "groups", "group_words")),
        *((name, ctypes.c_void_p) for name in ("mask", "starts", "values", "scale", "floor")),
    ]  # fmt: skip


class Attention(ctypes.Structure):
    """Attention over short sequences, as ``native/parts.h`` declares it."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("sequences", "heads", "queries", "keys", "dim")),
        *((name, ctypes.c_void_p) for name in ("q", "k", "v")),
        *((name, ctypes.c_int64 * 3) for name in ("q_stride", "k_stride", "v_stride")),
        ("mask", ctypes.c_void_p), ("mask_stride", ctypes.c_int64 * 2), ("out", ctypes.c_void_p),
        ("path", ctypes.c_char_p), ("scale", ctypes.c_float), ("failed", ctypes.c_int32),
    ]  # fmt: skip


class EncoderBlock(ctypes.Structure):
    """A transformer block of an encoder, as ``native/parts.h`` declares it."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("sequences", "tokens", "width", "heads", "together")),
        ("x", ctypes.c_void_p), ("y", ctypes.c_void_p),
        ("matrix", ctypes.c_void_p * 6), ("bias", ctypes.c_void_p * 6),
        ("weight", ctypes.c_void_p * 2), ("shift", ctypes.c_void_p * 2), ("epsilon", ctypes.c_float * 2),
        ("scale", ctypes.c_float),
        *((name, ctypes.c_int32) for name in ("digits", "norms_first", "reserved")),
        ("mask", ctypes.c_void_p), ("mask_stride", ctypes.c_int64 * 2), ("path", ctypes.c_char_p),
    ]  # fmt: skip


class DecoderBlock(ctypes.Structure):
    """One block of ``Decoder``, as ``native/parts.h`` declares it."""

    _fields_ = [
        ("matrix", ctypes.c_void_p * 7), ("bias", ctypes.c_void_p * 7),
        ("weight", ctypes.c_void_p * 2), ("shift", ctypes.c_void_p * 2), ("epsilon", ctypes.c_float * 2),
        ("head_weight", ctypes.c_void_p * 2), ("head_epsilon", ctypes.c_float * 2),
        ("keys", ctypes.c_void_p), ("values", ctypes.c_void_p), ("window", ctypes.c_int64),
    ]  # fmt: skip


class Decoder(ctypes.Structure):
    """Blocks of a decoder over a cache, as ``native/parts.h`` declares them."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("rows", "count", "width", "heads", "groups", "dim", "capacity")),
        ("blocks", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("block", "x", "y", "starts", "cosine", "sine")),
        *((name, ctypes.c_int64) for name in ("origin", "turns", "turned")),
        *((name, ctypes.c_void_p) for name in ("head", "head_bias", "weight", "shift", "scores")),
        ("epsilon", ctypes.c_float), ("scale", ctypes.c_float),
        *((name, ctypes.c_int32) for name in ("digits", "centred")), ("path", ctypes.c_char_p),
    ]  # fmt: skip


_SIGNATURES: dict[str, tuple[type | None, tuple[type, ...]]] = {
    "layerwise_version": (ctypes.c_int32, ()),
    "layerwise_threads": (ctypes.c_char_p, ()),
    "layerwise_path": (ctypes.c_char_p, (ctypes.c_int32,)),
    "layerwise_repack": (ctypes.c_void_p, (ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32)),
    "layerwise_take": (
        ctypes.c_int32,
        (ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p),
    ),
    "layerwise_copy": (ctypes.c_void_p, (ctypes.c_void_p, ctypes.c_int32)),
    "layerwise_release": (None, (ctypes.c_void_p,)),
    "layerwise_bytes": (ctypes.c_int64, (ctypes.c_void_p,)),
    "layerwise_multiply": (
        ctypes.c_int32,
        (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p)
        + (ctypes.c_int64, ctypes.c_void_p, ctypes.c_int32, ctypes.c_int32),
    ),
    "layerwise_sparse": (
        ctypes.c_int32,
        (ctypes.c_void_p, ctypes.c_int64, ctypes.c_char_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64)
        + (ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p, ctypes.c_int32),
    ),
    "layerwise_decode": (
        ctypes.c_int32,
        (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p, ctypes.c_int64)
        + (ctypes.c_int32,),
    ),
    "layerwise_attend": (ctypes.c_int32, (ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32)),
    "layerwise_encode": (ctypes.c_int32, (ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32)),
    "layerwise_continue": (ctypes.c_int32, (ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32)),
    **{
        f"layerwise_{name}": (ctypes.c_int32, (ctypes.c_void_p, ctypes.c_int64, ctypes.c_char_p))
        for name in ("best", "nearest", "columns", "cut", "recut")
    },
    "layerwise_dots": (ctypes.c_int64, (ctypes.c_char_p, ctypes.c_int64, ctypes.c_int32)),
    "layerwise_read_memory": (
        ctypes.c_uint64,
        (ctypes.c_void_p, ctypes.c_int64, ctypes.c_char_p, ctypes.c_int32),
    ),
    "layerwise_read": (ctypes.c_uint64, (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int32)),
}


@cache
def library() -> ctypes.CDLL | None:
    """The loaded library, or None; ``why_absent`` says why."""
    return _load()[0]


def why_absent() -> str:
    """Why there is no library, as a clause; empty when there is one."""
    return _load()[1]


def paths() -> tuple[str, ...]:
    """The paths that run here, best first; none without the library."""
    loaded = library()
    if loaded is None:
        return ()
    named = (loaded.layerwise_path(index) for index in range(len(KNOWN_PATHS)))
    return tuple(name.decode() for name in named if name is not None)


def chosen_path() -> str | None:
    """The path that products take, None for torch's reference.

    Raises ``InputError`` where the environment variable names a path that does not exist or does not run here.
    """
    wanted = os.environ.get(VARIABLE, "")
    return _chosen(wanted)


@cache
def _chosen(wanted: str) -> str | None:
    if wanted == OFF:
        return None
    if wanted and wanted not in KNOWN_PATHS:
        known = (*KNOWN_PATHS, OFF)
        raise InputError(f"{VARIABLE} is one of {', '.join(known)}, not {wanted!r}{nearest(wanted, list(known))}")
    here = paths()
    if not here:
        said = f"torch multiplies packed weights, slowly, since there are no compiled kernels: {why_absent()}"
        warnings.warn(said, RuntimeWarning, stacklevel=2)
        return None
    if wanted and wanted not in here:
        raise InputError(f"{VARIABLE} names {wanted}, but this processor runs {', '.join(here)}")
    return wanted or here[0]


def required(path: str | None) -> tuple[ctypes.CDLL, str]:
    """(the library, ``path`` or the chosen one); ``RuntimeError`` where there is none."""
    loaded, path = library(), path or chosen_path()
    if loaded is None or path is None:
        raise RuntimeError("there is no compiled library, or it is turned off")
    return loaded, path


@cache
def _load() -> tuple[ctypes.CDLL | None, str]:
    built = sorted(Path(__file__).parent.glob("_native*.so"))
    if not built:
        return None, "they were not compiled; install layerwise again where there is a C++ compiler"
    suffix = _suffix()
    own = [path for path in built if path.name == f"_native{suffix}"] or built
    try:
        found = ctypes.CDLL(str(own[0]))
        for name, (result, arguments) in _SIGNATURES.items():
            function = getattr(found, name)
            function.restype, function.argtypes = result, arguments
    except (OSError, AttributeError) as broken:
        return None, f"they cannot be loaded ({broken})"
    if found.layerwise_version() != VERSION:
        return None, "they are of another version of layerwise; install it again"
    _keep_freed_memory()
    return found, ""


def _keep_freed_memory() -> None:
    """Let the C library reuse memory of the size of activations instead of returning it to the system each time.

    glibc maps blocks above 128 KiB afresh and gives them back when they are freed, so that every activation of every
    layer meets page faults: measured on an encoder of MiniLM's size, 7000 of them and a quarter of the time of a batch.
    It raises its limit to the size of the largest such block that a program has freed; one is allocated here and freed
    again, untouched. Up to twice its size may then stay with the process after it was freed.
    """
    if sys.platform != "linux":
        return
    try:
        libc = ctypes.CDLL(None)
        libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, (ctypes.c_size_t,)
        libc.free.restype, libc.free.argtypes = None, (ctypes.c_void_p,)
        libc.free(libc.malloc(LARGEST_KEPT))
    except (OSError, AttributeError):
        return


def _suffix() -> str:
    import sysconfig

    return str(sysconfig.get_config_var("EXT_SUFFIX"))
