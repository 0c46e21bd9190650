"""Synthetic evidence that looks like real runs: a MiniLM-like encoder, a LLaMA-like decoder, and hostile names."""

from __future__ import annotations

import math
import random
from typing import Any

RECIPES = [
    "two_sided:bits=2,group=64",
    "two_sided:bits=3,group=64",
    "gptq:bits=3,group=32",
    "two_sided:bits=4,group=64",
    "two_sided:bits=5,group=64",
    "awq+gptq:bits=4,group=32",
    "two_sided:bits=6,group=128",
    "rtn:bits=8,group=128",
]
BPW = {r: int(r.split("bits=")[1][0]) + 16 / int(r.rsplit("=", 1)[1]) for r in RECIPES} | {"fp16": 16.0, "int8": 8.06}
ENCODER = [
    "attention.self.query",
    "attention.self.key",
    "attention.self.value",
    "attention.output.dense",
    "intermediate.dense",
    "output.dense",
]
DECODER = [
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
]


def encoder_evidence(seed: int = 0) -> dict[str, Any]:
    """MiniLM-like: 6 blocks of 6 linears, fp16 position and type tables, an unreached pooler."""
    shapes = dict.fromkeys(ENCODER, (384, 384)) | {"intermediate.dense": (1536, 384), "output.dense": (384, 1536)}
    sites = [(f"encoder.layer.{b}.{n}", f"encoder.layer.{b}", "linear", *shapes[n]) for b in range(6) for n in ENCODER]
    sites = [
        ("embeddings.word_embeddings", None, "table", 30522, 384),
        ("embeddings.position_embeddings", None, "table", 512, 384),
        ("embeddings.token_type_embeddings", None, "table", 2, 384),
        *sites,
        ("pooler.dense", None, "other", 384, 384),
    ]
    fixed = {
        "embeddings.position_embeddings": "fp16",
        "embeddings.token_type_embeddings": "fp16",
        "pooler.dense": "int8",
    }
    quality = {
        "dense": {"distance": {"value": 0.0}, "stsb_spearman": {"value": 82.03, "low": 80.31, "high": 83.62}},
        "plan": {"distance": {"value": 0.0102}, "stsb_spearman": {"value": 81.97, "low": 80.22, "high": 83.58}},
        "baseline": {"distance": {"value": 0.0431}, "stsb_spearman": {"value": 81.40, "low": 79.61, "high": 83.02}},
    }
    evidence = _evidence(
        seed,
        sites,
        fixed,
        "distance",
        quality,
        "sentence-transformers/all-MiniLM-L6-v2",
        "BertModel",
        22_713_216,
        90_864_192,
        "float32",
        6,
        4.48,
    )
    evidence["network"]["sentence_transformers"] = True
    _site(evidence, "pooler.dense")["note"] = "the loss does not reach it: int8, never searched"
    thin = _site(evidence, "encoder.layer.5.output.dense")
    thin["tokens"] = 1200
    for row, time in zip(evidence["rows"], (18.2, 21.9, 21.4), strict=True):
        row["latency_ms"] = time
    return evidence


def decoder_evidence(seed: int = 1, blocks: int = 32) -> dict[str, Any]:
    """LLaMA-like: 32 blocks of 7 linears, a tied table and head."""
    shapes = dict.fromkeys(DECODER, (4096, 4096)) | {
        "self_attn.k_proj": (1024, 4096),
        "self_attn.v_proj": (1024, 4096),
        "mlp.gate_proj": (14336, 4096),
        "mlp.up_proj": (14336, 4096),
        "mlp.down_proj": (4096, 14336),
    }
    sites = [
        (f"model.layers.{b}.{n}", f"model.layers.{b}", "linear", *shapes[n]) for b in range(blocks) for n in DECODER
    ]
    sites = [("model.embed_tokens", None, "table", 128256, 4096), *sites, ("lm_head", None, "head", 128256, 4096)]
    quality = {
        "dense": {"perplexity": {"value": 6.143}, "kl": {"value": 0.0}, "top1": {"value": 1.0}},
        "plan": {
            "perplexity": {"value": 6.391},
            "kl": {"value": 0.0313, "low": 0.0296, "high": 0.0331},
            "top1": {"value": 0.9231},
        },
        "baseline": {
            "perplexity": {"value": 6.902},
            "kl": {"value": 0.0874, "low": 0.0841, "high": 0.0905},
            "top1": {"value": 0.8774},
        },
    }
    return _evidence(
        seed,
        sites,
        {},
        "kl",
        quality,
        "example/decoder-8b",
        "LlamaForCausalLM",
        8_030_261_248,
        16_060_556_376,
        "bfloat16",
        blocks,
        3.4,
    )


def hostile_evidence() -> dict[str, Any]:
    """Every free text tries to break out of where it is put."""
    evil = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\"'&`|\u2028]]><!--"
    evidence = encoder_evidence()
    evidence["network"] |= {"name": evil, "class": evil, "dense_dtype": evil}
    evidence["command"] = evidence["replan"] = evidence["machine"] = "layerwise ```\n" + evil
    evidence["budget"]["text"] = evil
    evidence["loss"]["unit"] = evil
    evidence["data"]["calibration"]["source"] = evidence["data"]["evaluation"]["source"] = evil
    evidence["versions"][evil] = evil
    evidence["rows"][1]["quality"][evil] = {"value": 1.0}
    evidence["rows"][2]["recipe"] = evil
    evidence["recipe_names"][0] = evil
    evidence["recipe_bpw"][evil] = 2.5
    evidence["seconds"][evil] = 1.0
    evidence["checks"] = {evil: evil}
    for site in evidence["sites"]:
        site["site"] += evil
        site["block"] = site["block"] and site["block"] + evil
        site["recipe"] = site["note"] = evil
    for pair in evidence["sampled"] + evidence["uniform"]:
        pair["recipe"] = evil
    return evidence


def bare_evidence() -> dict[str, Any]:
    """Only what the schema requires."""
    evidence = encoder_evidence()
    for key in (
        "replan",
        "budget",
        "predicted",
        "front",
        "recipe_names",
        "recipe_bpw",
        "uniform",
        "sampled",
        "checks",
        "peak_memory",
        "seed",
        "threads",
        "versions",
        "machine",
    ):
        del evidence[key]
    del evidence["data"]["evaluation"]
    evidence["rows"] = evidence["rows"][:2]
    for row in evidence["rows"]:
        row["quality"] = {}
        del row["latency_ms"]
    for site in evidence["sites"]:
        for key in ("next_better", "next_cheaper", "note"):
            site.pop(key, None)
    return evidence


def _site(evidence: dict[str, Any], name: str) -> dict[str, Any]:
    return next(s for s in evidence["sites"] if s["site"] == name)


def _evidence(seed, sites, fixed, loss, quality, name, cls, parameters, dense_bytes, dtype, blocks, plan_bpw):
    chance = random.Random(seed)
    importance = []
    for i, (site, _, kind, rows, columns) in enumerate(sites):
        depth = 1.0 + 1.5 * math.exp(-i / 6) + 0.6 * (i / len(sites)) ** 4
        narrow = 2.2 if site.endswith(("value", "v_proj", "output.dense", "down_proj")) else 1.0
        importance.append(
            rows * columns / 1e6 * depth * narrow * chance.lognormvariate(0, 0.45) * (0.15 if kind == "table" else 1.0)
        )

    def size(i: int, recipe: str) -> int:
        return round(sites[i][3] * sites[i][4] * BPW[recipe] / 8) + 96

    def damage(i: int, recipe: str) -> float:
        if sites[i][0] in fixed:
            return 0.0
        gain = 0.8 if "two_sided" in recipe else 1.0
        return importance[i] * gain * 4.3 ** -BPW[recipe] * 0.6 + 1e-9

    def choose(price: float) -> list[str]:
        return [
            fixed.get(s[0]) or min(RECIPES, key=lambda r: damage(i, r) + price * size(i, r))
            for i, s in enumerate(sites)
        ]

    everything = sum(s[3] * s[4] for s in sites)
    ladder = {}
    for step in range(400):
        chosen = choose(10 ** (-3 - step / 28))
        ladder[sum(size(i, r) for i, r in enumerate(chosen))] = chosen
    totals = sorted(ladder)
    targets = [totals[0] + (totals[-1] - totals[0]) * k / 19 for k in range(20)]
    stops = sorted({max((t for t in totals if t <= target), default=totals[0]) for target in targets})
    at = max((t for t in totals if t <= everything * plan_bpw / 8), default=totals[0])
    names = sorted(BPW)
    scale = quality["plan"][loss]["value"] / sum(damage(i, r) for i, r in enumerate(ladder[at])) / 1.07

    def point(total: int) -> dict[str, Any]:
        each = [damage(i, r) * scale for i, r in enumerate(ladder[total])]
        return {
            "budget": total + 500,
            "bytes": total,
            "damage": sum(each),
            "site_damage": each,
            "site_bytes": [size(i, r) for i, r in enumerate(ladder[total])],
            "recipes": [names.index(r) for r in ladder[total]],
        }

    def alternative(i: int, recipe: str, step: int) -> dict[str, Any] | None:
        order = sorted(RECIPES, key=lambda r: BPW[r])
        if recipe not in order or not 0 <= order.index(recipe) + step < len(order):
            return None
        other = order[order.index(recipe) + step]
        return {"recipe": other, "bytes": size(i, other), "damage": damage(i, other) * scale}

    plan = ladder[at]
    described = [
        {
            "site": s[0],
            "block": s[1],
            "kind": s[2],
            "rows": s[3],
            "columns": s[4],
            "recipe": plan[i],
            "bytes": size(i, plan[i]),
            "bpw": size(i, plan[i]) * 8 / (s[3] * s[4]),
            "damage": damage(i, plan[i]) * scale,
            "next_better": alternative(i, plan[i], 1),
            "next_cheaper": alternative(i, plan[i], -1),
            "tokens": 14_336,
            "note": "",
        }
        for i, s in enumerate(sites)
    ]
    uniform = []
    for bits in (2, 3, 4, 8):
        for technique in ("rtn", "gptq"):
            recipe = f"{technique}:bits={bits},group=64"
            share = 4.3 ** -(bits + 0.25) * (2.6 if technique == "rtn" else 1.5) * scale * 0.6
            predicted = sum(share * imp for imp in importance)
            uniform.append(
                {
                    "recipe": recipe,
                    "bytes": round(everything * (bits + 0.25) / 8),
                    "damage": predicted,
                    "measured": predicted * 1.12 if bits in (3, 4) else None,
                }
            )
    sampled = []
    for i in chance.sample(range(len(sites)), min(len(sites), 24)):
        for bits in (2, 3, 4):
            recipe = f"two_sided:bits={bits},group=64"
            expected = damage(i, recipe) * scale if recipe in BPW else 0.0
            if expected > 0:
                sampled.append(
                    {
                        "site": sites[i][0],
                        "recipe": recipe,
                        "predicted": expected,
                        "measured": expected * chance.lognormvariate(0.1, 0.3),
                    }
                )
    linear = [i for i, s in enumerate(sites) if s[2] == "linear"]
    plan_row = {
        "name": "plan",
        "recipe": None,
        "bytes": at,
        "bpw": at * 8 / parameters,
        "linear_bytes": sum(size(i, plan[i]) for i in linear),
        "quality": quality["plan"],
    }
    base_bytes = round(everything * 4.25 / 8 * plan_bpw / 4.2)
    return {
        "format": "layerwise-evidence",
        "version": 1,
        "created": "2026-11-21T02:45:00Z",
        "command": f"layerwise compress {name} OUT --budget {plan_bpw}bpw --calibrate wiki.txt --seed {seed}",
        "replan": f"layerwise plan OUT.work --budget 3.5bpw --apply {name.split('/')[-1]}-3.5bpw",
        "network": {
            "name": name,
            "class": cls,
            "parameters": parameters,
            "blocks": blocks,
            "dense_bytes": dense_bytes,
            "dense_dtype": dtype,
            "fingerprint": "3f9a" * 16,
            "sentence_transformers": False,
        },
        "data": {
            "calibration": {
                "source": "wiki.txt",
                "sequences": 128,
                "tokens": 32_768,
                "fit": 58,
                "judge": 45,
                "steer": 25,
            },
            "evaluation": {"source": "held-out.txt", "sequences": 64, "tokens": 16_384, "same_source": True},
        },
        "budget": {"text": f"{plan_bpw}bpw", "bytes": at + 700},
        "loss": {"name": loss, "unit": "squared distance per text" if loss == "distance" else "nats per token"},
        "rows": [
            {
                "name": "dense",
                "recipe": None,
                "bytes": dense_bytes,
                "bpw": dense_bytes * 8 / parameters,
                "linear_bytes": None,
                "quality": quality["dense"],
            },
            plan_row,
            {
                "name": "baseline",
                "recipe": "rtn:bits=4,group=64",
                "bytes": base_bytes,
                "bpw": base_bytes * 8 / parameters,
                "linear_bytes": round(base_bytes * 0.5),
                "quality": quality["baseline"],
            },
        ],
        "predicted": {"damage": sum(s["damage"] for s in described), "measured": quality["plan"][loss]["value"]},
        "sites": described,
        "front": [point(t) for t in stops],
        "recipe_names": names,
        "recipe_bpw": dict(BPW),
        "uniform": uniform,
        "sampled": sampled,
        "checks": {"predicted size = size on disk": True, "decoded weights finite": True},
        "seconds": {
            "total": 81.6,
            "open": 0.9,
            "calibrate": 6.2,
            "candidates": 58.3,
            "plan": 1.4,
            "apply": 3.0,
            "evaluate": 11.8,
        },
        "peak_memory": 612_000_000,
        "seed": seed,
        "threads": 2,
        "versions": {"layerwise": "0.1.0", "torch": "2.13.0", "transformers": "5.23.0", "python": "3.11.9"},
        "machine": "x86_64, 2 cores, AVX2",
    }
