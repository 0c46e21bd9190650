"""Train docs-gpt2, the small GPT-2 that benches and tests use where a network must be Pre-LN with LayerNorms.

Text and held-out split are those of docs-lm, from ``train_docs_lm.py`` beside this file.

    python examples/train_docs_gpt2.py --out examples/docs-gpt2 --minutes 10

The network: 3 layers, hidden 96, 3 heads, feed-forward 384, 256 positions, vocabulary 1024 (byte-level BPE), tied
table and head: 0.46 M parameters, stored as fp16. Its test is that it is a trained network, not that it is a good one.
"""

import argparse
import json
import math
import platform
import sys
import time
from pathlib import Path

from train_docs_lm import save, split_documents, standard_library_documents, train_tokenizer

CONTEXT = 128
POSITIONS = 256
VOCABULARY = 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("examples/docs-gpt2"))
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rate", type=float, default=4e-3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=12)
    train(parser.parse_args(), *split_documents(standard_library_documents()))


def train(arguments: argparse.Namespace, train_text: str, held_out_text: str) -> None:
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(arguments.seed)
    torch.set_num_threads(arguments.threads)
    arguments.out.mkdir(parents=True, exist_ok=True)

    raw = train_tokenizer(train_text, VOCABULARY, POSITIONS, arguments.out)
    train_ids = torch.tensor(raw.encode(train_text).ids)
    held_out_ids = torch.tensor(raw.encode(held_out_text).ids)
    print(f"{len(train_ids)} training tokens, {len(held_out_ids)} held-out tokens", flush=True)

    network = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCABULARY,
            n_positions=POSITIONS,
            n_embd=96,
            n_layer=3,
            n_head=3,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=1,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
        )
    )
    print(f"{sum(p.numel() for p in network.parameters())} parameters", flush=True)
    optimiser = torch.optim.AdamW(
        [
            {"params": [p for p in network.parameters() if p.dim() > 1], "weight_decay": 0.1},
            {"params": [p for p in network.parameters() if p.dim() == 1], "weight_decay": 0.0},
        ],
        lr=arguments.rate,
        betas=(0.9, 0.95),
        fused=True,
    )

    @torch.no_grad()
    def perplexity() -> float:
        """Over windows as long as those of training, of the held-out text."""
        network.eval()
        count, total = (len(held_out_ids) - 1) // CONTEXT, 0.0
        for start in range(0, count, 64):
            rows = range(start, min(start + 64, count))
            x = torch.stack([held_out_ids[k * CONTEXT : (k + 1) * CONTEXT + 1] for k in rows])
            logits = network(input_ids=x[:, :-1], use_cache=False).logits.float()
            total += torch.nn.functional.cross_entropy(logits.flatten(0, 1), x[:, 1:].flatten(), reduction="sum").item()
        network.train()
        return math.exp(total / (count * CONTEXT))

    log: list[dict[str, object]] = []
    began, budget, step, next_check = time.time(), arguments.minutes * 60, 0, 60.0
    while (spent := time.time() - began) < budget:
        # The cosine follows the clock, so that a run of any length ends annealed.
        rate = min(1.0, (step + 1) / 100) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * spent / budget)))
        for group in optimiser.param_groups:
            group["lr"] = arguments.rate * rate
        starts = torch.randint(0, len(train_ids) - CONTEXT - 1, (arguments.batch,))
        # Any position may begin a window, so that all of them are learnt.
        places = torch.arange(CONTEXT) + torch.randint(0, POSITIONS - CONTEXT + 1, (arguments.batch, 1))
        x = torch.stack([train_ids[s : s + CONTEXT + 1] for s in starts])
        logits = network(input_ids=x[:, :-1], position_ids=places, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), x[:, 1:].flatten())
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimiser.step()
        step += 1
        if spent > next_check:
            next_check += 60
            log.append({"minutes": round(spent / 60, 1), "step": step, "loss": round(loss.item(), 3)})
            print(log[-1], flush=True)
    save(network, arguments.out)
    network.load_state_dict(GPT2LMHeadModel.from_pretrained(arguments.out, dtype=torch.float32).state_dict())
    log.append(
        {
            "final": True,
            "step": step,
            "tokens": step * arguments.batch * CONTEXT,
            "held_out_perplexity": round(perplexity(), 3),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "seed": arguments.seed,
            "minutes": arguments.minutes,
        }
    )
    print(log[-1], flush=True)
    (arguments.out / "train_log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in log))


if __name__ == "__main__":
    sys.exit(main())
