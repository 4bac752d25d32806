"""Train a GPT of characters with K-FAC: `python examples/gpt_on_text.py [TEXT FILE]`, by default on the README."""

import sys
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import curvlib
from curvlib import Fisher
from curvlib.approximations import KFAC

CONTEXT, WIDTH, HEADS, BATCH, STEPS = 32, 32, 4, 64, 31


class Block(nn.Module):
    """Causal attention and a multi-layer perceptron, each behind a layer norm and added to its input."""

    def __init__(self) -> None:
        super().__init__()
        self.ln1, self.ln2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.projection = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        """Return x (N, T, WIDTH) with both added."""
        q, k, v = self.qkv(self.ln1(x)).unflatten(2, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        attended = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.projection(attended.transpose(1, 2).flatten(2))
        return x + self.mlp(self.ln2(x))


class GPT(nn.Module):
    """Two blocks; the output layer has the weight of the embedding, and curvlib makes one layer of both."""

    def __init__(self, symbols: int) -> None:
        super().__init__()
        self.embedding, self.positions = nn.Embedding(symbols, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        self.blocks, self.ln = nn.Sequential(Block(), Block()), nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, symbols, bias=False)
        nn.init.normal_(self.embedding.weight, std=0.02)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        """(N, T) -> logits (N, symbols, T)."""
        # Expanded, so that every example has its own lookup: curvature is a statistic of examples.
        places = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        x = self.blocks(self.embedding(tokens) + self.positions(places))
        return self.head(self.ln(x)).transpose(1, 2)


def main(path: Path) -> None:
    """Print the layers' blocks, then the loss as it falls."""
    symbols, text = torch.tensor(list(path.read_bytes())).unique(return_inverse=True)
    torch.manual_seed(0)
    objective = curvlib.Objective(GPT(len(symbols)), nn.CrossEntropyLoss(), l2=1e-5)
    print(objective.describe(KFAC(Fisher())))
    optimizer = curvlib.optimizers.kfac(objective, model_fraction=1.0)
    with sdpa_kernel(
        SDPBackend.MATH
    ):  # the fused kernels cannot be differentiated twice; curvlib would say so and do it
        for step in range(STEPS):
            starts = torch.randint(len(text) - CONTEXT, (BATCH, 1))
            window = text[starts + torch.arange(CONTEXT + 1)]
            result = optimizer.step((window[:, :-1], window[:, 1:]))
            if step % 10 == 0:
                print(f"step {step:>3}   loss {result.loss:.3f}   damping {result.damping:.2g}")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent.parent / "README.md")
