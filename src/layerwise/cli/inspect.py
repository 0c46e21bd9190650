"""``layerwise inspect MODEL``: the site tree, read off headers."""

from __future__ import annotations

from typing import Any

from layerwise.cli import shared


def inspect(model: shared.Model, json: shared.Json = False) -> None:
    """Print the site tree of MODEL: shapes, parameters, bytes, ties."""
    from layerwise.loss import loss_of
    from layerwise.network.network import open_network
    from layerwise.plan.targets import described
    from layerwise.report.figures import megabytes

    network = open_network(model)
    loss = loss_of(network.architecture, network.checkpoint.directory)
    rows: list[dict[str, Any]] = [
        {
            "site": s.name, "kind": s.kind, "rows": s.rows, "columns": s.columns, "parameters": s.parameters,
            "bytes": network.bytes_of(s), "block": s.block, "encoded": network.kept_spec(s),
            "tied_to": s.head, "transposed": s.transposed, "searched": s.searched,
        }
        for s in network.tree.sites
    ]  # fmt: skip
    if json:
        shared.print_json(
            {
                "network": network.name, "class": network.architecture, "parameters": network.tree.parameters,
                "bytes": network.checkpoint.safetensors_bytes, "blocks": list(network.tree.blocks),
                "loss": loss.name, "unit": loss.unit, "sites": rows,
            }
        )  # fmt: skip
        return
    shared.print_table(
        f"{network.name}: {network.architecture}, {network.tree.parameters:,} parameters, "
        f"{megabytes(network.checkpoint.safetensors_bytes)}, {len(network.tree.blocks)} blocks, loss: {loss.unit}",
        ("site", "kind", "shape", "parameters", "bytes", "", ""),
        [
            (
                str(r["site"]),
                str(r["kind"]),
                f"{r['rows']} × {r['columns']}",
                f"{r['parameters']:,}",
                f"{r['bytes']:,}",
                f"tied to {r['tied_to']}" if r["tied_to"] else "stored transposed" if r["transposed"] else "",
                described(r["encoded"]) if r["encoded"] else "",
            )
            for r in rows
        ],
        numeric=(2, 3, 4),
    )
