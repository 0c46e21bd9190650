"""Everything that is checked before long work starts: network, text, techniques, budget, disk.

Whatever is wrong in what the user gave is found here, in seconds, and nothing has been written.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from layerwise.acts.activations import most_input_bytes, quantizer_of
from layerwise.acts.candidates import kept_layout, plain_recipe, stored_bytes
from layerwise.acts.images import Given, image_data
from layerwise.acts.offering import menu_of
from layerwise.acts.opening import open_rewritten
from layerwise.acts.refusing import refuse_block_by_block, refuse_of_arranged
from layerwise.calibrate.splits import Splits, batches_of, make_splits, set_aside, tokens_in
from layerwise.calibrate.text import DEFAULT, Text, read_text, refuse_overlap
from layerwise.errors import InputError
from layerwise.evaluate.sentences import pair_batches
from layerwise.loss import Loss, loss_of_network
from layerwise.network.network import Network, reads_images
from layerwise.network.reblocked import reblocked
from layerwise.network.safetensors_file import header_fixed
from layerwise.network.sites import Site
from layerwise.network.sizes import largest_file, plain_bytes, plain_of_block
from layerwise.network.streaming import Batch
from layerwise.plan.budget import Budget, QualityLoss, parse_budget, parse_quality_loss
from layerwise.plan.candidates import layout_of
from layerwise.plan.file import read_plan
from layerwise.plan.fused import check_fused
from layerwise.plan.menu import Menu
from layerwise.plan.targets import find_target
from layerwise.recipe import parse_activations, parse_allocator, parse_technique, parse_tuner
from layerwise.roles import ActivationQuantizer, BlockMeasure

METADATA = {"format": "pt"}


@dataclass(frozen=True)
class Options:
    """What the user asked for; the names are those of the command line."""

    model: str
    out: str = ""
    budget: str | None = None
    quality_loss: str | None = None
    uniform: str | None = None
    embeddings: str = "same"
    techniques: tuple[str, ...] = ()
    calibrate: str = DEFAULT
    evaluate: str | None = None
    sequences: int = 128
    length: int = 256
    text_column: str | None = None
    pooling: str | None = None
    seed: int = 0
    threads: int = field(default_factory=lambda: os.cpu_count() or 1)
    workers: int = field(default_factory=lambda: os.cpu_count() or 1)
    dtype: str = "auto"
    device: str = "cpu"
    work: str | None = None
    sequential: bool = False
    tune: str | None = None
    baseline: bool = True
    force: bool = False
    keep: tuple[str, ...] = ()
    fix: tuple[str, ...] = ()
    redo: tuple[str, ...] = ()
    plan: str | None = None
    rewrite: str | None = None
    activations: str | None = None
    target: str | None = None
    allocators: tuple[str, ...] = ()  # that plan instead of layerwise's own; compress takes one, compare several

    def __post_init__(self) -> None:
        for name, low, high in (
            ("sequences", 4, 1 << 20), ("length", 8, 1 << 20), ("threads", 1, 4096), ("workers", 1, 4096),
        ):  # fmt: skip
            value = getattr(self, name)
            if not low <= value <= high:
                raise InputError(f"--{name} must be from {low} to {high}, not {value}")
        asked = [n for n in ("budget", "quality_loss", "uniform", "plan") if getattr(self, n) is not None]
        if len(asked) > 1:
            listed = " and ".join("--" + n.replace("_", "-") for n in asked)
            raise InputError(f"give only one of {listed}")
        if self.dtype not in ("auto", "float16", "bfloat16"):
            raise InputError(f"--dtype must be auto, float16 or bfloat16, not {self.dtype!r}")
        if self.tune is not None:
            parse_tuner(self.tune)
        if self.activations is not None:
            parse_activations(self.activations)
        for text in self.allocators:
            parse_allocator(text)
        if find_target(self.target) is not None and self.activations is not None:
            raise InputError(f"{self.target} loads no quantized inputs of ours; leave out --activations")
        if self.allocators and self.budget is None:
            raise InputError(f"--allocator {self.allocators[0]} plans within a size; give it a --budget")


@dataclass(frozen=True)
class Evaluation:
    """Held-out batches; ``index`` and ``pairs`` are present when the text is scored sentence pairs."""

    text: Text
    batches: tuple[Batch, ...]
    same_source: bool
    index: Any = None


@dataclass(frozen=True)
class Range:
    """Sizes of the file that the menu can reach, and what does not depend on the plan."""

    fixed: int
    smallest: int
    largest: int


@dataclass(frozen=True)
class Prepared:
    """A run that may begin."""

    options: Options
    network: Network
    tokenizer: Any
    loss: Loss
    splits: Splits
    calibration_text: Text
    evaluation: Evaluation
    menu: Menu
    only: dict[str, str]
    range: Range
    budget: Budget | None
    quality: QualityLoss | None
    activations: ActivationQuantizer | None = None


def prepare(options: Options, given: Given = Given()) -> Prepared:
    """Open and check everything; reads headers and data, not weights."""
    quality = parse_quality_loss(options.quality_loss) if options.quality_loss else None
    budget = parse_budget(options.budget) if options.budget else None
    check_device(options.device)
    if options.out:
        check_out(Path(options.out), options.force)
    network = given.network or open_rewritten(options.model, options.dtype, options.rewrite)
    loss = loss_of_network(network, options.pooling)
    menu, only = menu_of(options, network)
    if network.whole:
        refuse_block_by_block(options, menu)
    if network.arrangement is not None:
        refuse_of_arranged(options, menu, only)
    if menu.surgeons:
        check_surgeons(menu, options, network)
    if options.plan is not None:
        check_plan(options.plan, network, menu, only)
    activations = quantizer_of(options.activations, options.plan, network)
    reach = reachable(network, menu, only, most_input_bytes(network, activations))
    if activations is not None and menu.target is not None:
        raise InputError(f"{menu.target.name} loads no quantized inputs of ours; leave the plan's activations out")
    if budget is not None:
        check_budget(budget, network, reach)
    if quality is not None:
        check_quality(quality, loss, network)
    check_plain(network)
    chosen = menu, only, reach, budget, quality, activations
    if reads_images(network):
        data = image_data(network, given, options)
        text, evaluation = Text(data.source, ()), Evaluation(Text(data.held_out, ()), data.batches, data.same_source)
        return Prepared(options, network, None, loss, data.splits, text, evaluation, *chosen)
    tokenizer = open_tokenizer(network)
    length = min(options.length, longest(network))
    text = read_text(options.calibrate, options.text_column)
    if options.evaluate is not None:
        held_out, same_source = read_text(options.evaluate, options.text_column), False
        refuse_overlap(text, held_out)
        calibration_text = text
    else:
        (calibration_text, held_out), same_source = set_aside(text, options.seed), True
    # A causal language model reads windows of running text; every other network reads texts one by one.
    windows = loss.causal
    splits = make_splits(calibration_text, tokenizer, windows, options.sequences, length, options.seed)
    evaluation = make_evaluation(held_out, same_source, tokenizer, loss, windows, options, length)
    check_tokens(splits.all, calibration_text, network)
    check_tokens(evaluation.batches, held_out, network)
    return Prepared(options, network, tokenizer, loss, splits, calibration_text, evaluation, *chosen)


def make_evaluation(
    text: Text, same_source: bool, tokenizer: Any, loss: Loss, windows: bool, options: Options, length: int
) -> Evaluation:
    if text.pairs and loss.kind == "distance":
        batches, index = pair_batches(text.pairs, tokenizer, length)
        return Evaluation(text, batches, same_source, index)
    batches = batches_of(text.documents, tokenizer, windows, max(64, options.sequences), length)
    if tokens_in(batches) < 32:
        raise InputError(
            f"the evaluation text {text.source} is too short: {tokens_in(batches)} tokens; "
            f"give more text with --evaluate"
        )
    return Evaluation(text, batches, same_source)


def reachable(network: Network, menu: Menu, only: dict[str, str], added: int = 0) -> Range:
    """Smallest and largest file that the menu can make, from shapes alone, and ``added`` bytes whatever is chosen."""
    fixed = header_fixed(METADATA) + added
    fixed += plain_bytes(network, network.plain_layout([s.name for s in network.tree.sites]))
    smallest = largest = fixed
    for site in network.tree.sites:
        recipes = recipes_for(site, menu, only, network)
        sizes = [site_bytes(site, recipe, network) for recipe in recipes]
        smallest, largest = smallest + min(sizes), largest + max(sizes)
    return Range(fixed, smallest - removable_bytes(network, menu, only), largest)


def removable_bytes(network: Network, menu: Menu, only: dict[str, str]) -> int:
    """What taking blocks out can save of the smallest file; one block at least remains."""
    if not menu.surgeons:
        return 0
    blocks = network.tree.blocks
    saved = sorted(
        plain_bytes(network, plain_of_block(network, block))
        + sum(
            min(site_bytes(s, r, network) for r in recipes_for(s, menu, only, network))
            for s in network.tree.of_block(block)
        )
        for block in blocks
    )
    removed = len(blocks) - len(remaining_blocks(menu, len(blocks)))
    return sum(saved[-removed:] if removed else saved[1:])


def remaining_blocks(menu: Menu, count: int) -> tuple[int, ...]:
    """What a surgeon leaves of equal blocks: all of them where the planner decides."""
    return parse_technique(menu.surgeons[0]).order([BlockMeasure(0.0, 0.0)] * count)  # type: ignore[attr-defined,no-any-return]


def recipes_for(site: Site, menu: Menu, only: dict[str, str], network: Network) -> tuple[str, ...]:
    """Recipes that may end up at a site, as far as shapes tell (reach is found later, by the gradient)."""
    if site.kind == "position":
        return (plain_recipe(network),)
    if site.name in only:
        return (only[site.name],)
    outside = site.block is None and site.kind == "linear"
    offered = (*menu.kept(site, network.kept_spec(site)), *menu.offered(site))
    return (*offered, *menu.unreached(site)) if outside else offered


def check_budget(budget: Budget, network: Network, reach: Range) -> None:
    wanted = budget.bytes(network.tree.parameters, network.checkpoint.safetensors_bytes)
    smallest, dense = reach.smallest, network.checkpoint.safetensors_bytes
    if wanted < smallest:
        raise InputError(
            f"a budget of {budget} is {wanted} bytes, below the smallest file these techniques can make: {smallest} "
            f"bytes ({8 * smallest / network.tree.parameters:.3f}bpw)"
        )
    if wanted > dense:
        raise InputError(
            f"a budget of {budget} is {wanted} bytes, above the network's own size of {dense} bytes; "
            f"there is nothing to compress"
        )


def check_plan(path: str, network: Network, menu: Menu, only: dict[str, str]) -> None:
    """A plan may name what this run will encode: the network's sites, and recipes of the menu."""
    plan = read_plan(path)
    plan.check_against(s.name for s in network.tree.sites)
    for site in network.tree.sites:
        asked = plan.sites[site.name].recipe
        if asked in menu.surgeons:
            continue
        encoders = {
            recipe.rpartition("+")[2] for recipe in (*recipes_for(site, menu, only, network), *menu.unreached(site))
        }
        if asked.rpartition("+")[2] not in encoders:
            raise InputError(
                f"the plan gives {site.name} the recipe {asked}, which these techniques do not try; "
                f"add --redo {site.name}={asked} to encode it there"
            )
    if menu.target is not None:
        kept = {s.name: (plan.sites[s.name].recipe, s.columns) for s in network.tree.sites}
        check_fused({n: v for n, v in kept.items() if v[0] not in menu.surgeons}, menu.target)


def check_surgeons(menu: Menu, options: Options, network: Network) -> None:
    """Blocks can only be taken out where the config can say so and nothing is propagated past them."""
    if options.sequential:
        raise InputError(
            f"--sequential encodes behind the stored prefix, where no block may be missing; leave out "
            f"{menu.surgeons[0]} or --sequential"
        )
    if len(menu.surgeons) > 1:
        raise InputError(f"only one technique may take blocks out; choose one of {', '.join(menu.surgeons)}")
    order = remaining_blocks(menu, len(network.tree.blocks))
    reblocked(network, order[: max(1, len(order) - 1)])  # refuses where no other order can be


def check_plain(network: Network) -> None:
    """What is not encoded (norms, biases, positions: a small part) must fit the 16-bit type it will be stored in."""
    for name in network.plain_parameters([s.name for s in network.tree.sites if s.kind != "position"]):
        value = network.read(name)
        if value.isfinite().all() and not value.to(network.plain_dtype).isfinite().all():
            raise InputError(
                f"tensor {name} holds {float(value.abs().max()):.3g}, which "
                f"{str(network.plain_dtype).removeprefix('torch.')} cannot hold; give --dtype bfloat16"
            )


def check_quality(quality: QualityLoss, loss: Loss, network: Network) -> None:
    """The measure asked for must be one that this network has."""
    if quality.measure == "perplexity" and not loss.causal:
        raise InputError(
            f"--quality-loss {quality} is a rise of perplexity, which {network.architecture} does not have; "
            f"write {loss.name}:0.01 instead"
        )
    if quality.measure in ("kl", "distance") and quality.measure != loss.name:
        raise InputError(
            f"--quality-loss {quality} does not fit {network.architecture}, whose loss is {loss.name}; "
            f"write {loss.name}:0.01 instead"
        )


def check_out(out: Path, force: bool) -> None:
    if out.exists() and not force:
        raise InputError(f"{out} exists; choose another name or give --force to replace it")
    if out.exists() and not (out.is_dir() and (not any(out.iterdir()) or (out / "config.json").exists())):
        raise InputError(f"{out} exists and does not look like a network; --force only replaces a checkpoint folder")
    if not out.absolute().parent.is_dir():
        raise InputError(f"the folder {out.absolute().parent} that is to hold {out.name} does not exist")


def check_device(device: str) -> None:
    import torch

    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError):
        raise InputError(f"there is no device {device!r} on this machine; use cpu") from None


def site_bytes(site: Site, recipe: str, network: Network) -> int:
    form = kept_layout(site, layout_of(recipe, site.rows, site.columns))
    return stored_bytes(site.name, form, largest_file(network))


def open_tokenizer(network: Network) -> Any:
    import transformers

    folder = network.checkpoint.directory
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
    except Exception:  # transformers raises many kinds for a missing or broken tokenizer
        raise InputError(
            f"{folder} has no tokenizer that transformers can read; put tokenizer.json beside config.json"
        ) from None
    return tokenizer


def check_tokens(batches: Sequence[Batch], text: Text, network: Network) -> None:
    """Every token must have a row in the table. A tokenizer may know more words, as long as no text comes to them."""
    rows = int(network.module.get_input_embeddings().weight.shape[0])  # type: ignore[operator]
    largest = max(int(batch.tokens.max()) for batch in batches)
    if largest >= rows:
        raise InputError(
            f"the tokenizer makes token {largest} of {text.source}, but the network's table has only {rows} rows; "
            f"give the network its own tokenizer"
        )


def longest(network: Network) -> int:
    """The longest text the network's positions allow."""
    config = network.module.config
    return int(getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None) or 1 << 20)  # type: ignore[arg-type]
