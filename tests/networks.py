"""Small copies of well-known architectures, written the way users write them: in place, fused, tied, unrolled."""

import torch
from torch import nn
from torch.nn import functional

from benchmarks.convolutional_networks import ResNet18


def resnet18(width=4, classes=3):
    """ResNet-18 as torchvision writes it; 64 channels are ``width`` here."""
    return ResNet18(width, classes, large_images=True)


class CausalAttention(nn.Module):
    """Query, key and value from one Linear, PyTorch's fused attention."""

    def __init__(self, E, heads):
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(E, 3 * E), nn.Linear(E, E)

    def forward(self, x):
        N, T, E = x.shape
        q, k, v = self.qkv(x).view(N, T, 3, self.heads, E // self.heads).permute(2, 0, 3, 1, 4)
        y = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.proj(y.transpose(1, 2).reshape(N, T, E))


class GPTBlock(nn.Module):
    def __init__(self, E, heads):
        super().__init__()
        self.ln1, self.attention = nn.LayerNorm(E), CausalAttention(E, heads)
        self.ln2 = nn.LayerNorm(E)
        self.mlp = nn.Sequential(nn.Linear(E, 2 * E), nn.GELU(), nn.Linear(2 * E, E))

    def forward(self, x):
        x = x + self.attention(self.ln1(x))
        return x + self.mlp(self.ln2(x))


class GPT(nn.Module):
    """Tokens (N, T) -> logits (N, V, T); the output head has the weight of the token embedding."""

    def __init__(self, vocabulary=5, E=4, heads=2, layers=2, context=4):
        super().__init__()
        self.embedding, self.positions = nn.Embedding(vocabulary, E), nn.Embedding(context, E)
        self.blocks = nn.Sequential(*(GPTBlock(E, heads) for _ in range(layers)))
        self.ln = nn.LayerNorm(E)
        self.head = nn.Linear(E, vocabulary, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens):
        # positions with the examples first, so that their rows are positions of each example
        places = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        x = self.embedding(tokens) + self.positions(places)
        return self.head(self.ln(self.blocks(x))).transpose(1, 2)


class ViT(nn.Module):
    """Vision transformer; class token and positions are parameters of the model itself, outside of every layer."""

    def __init__(self, size=4, patch=2, E=4, heads=2, layers=1, classes=3):
        super().__init__()
        self.patches = nn.Conv2d(2, E, patch, stride=patch)
        self.token = nn.Parameter(torch.randn(1, 1, E))
        self.positions = nn.Parameter(torch.randn(1, (size // patch) ** 2 + 1, E))
        self.encoder = nn.Sequential(
            *(
                nn.TransformerEncoderLayer(E, heads, 2 * E, dropout=0.0, batch_first=True, norm_first=True)
                for _ in range(layers)
            )
        )
        self.ln, self.head = nn.LayerNorm(E), nn.Linear(E, classes)

    def forward(self, x):
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], dim=1) + self.positions
        return self.head(self.ln(self.encoder(x))[:, 0])


class UNet(nn.Module):
    """One step down, one up by a transposed convolution, a skip concatenation: (N, 1, S, S) -> (N, classes, S, S)."""

    def __init__(self, width=2, classes=2):
        super().__init__()
        self.down = nn.Sequential(nn.Conv2d(1, width, 3, padding=1), nn.GroupNorm(2, width), nn.SiLU(inplace=True))
        self.bottom = nn.Sequential(
            nn.Conv2d(width, 2 * width, 3, stride=2, padding=1), nn.GroupNorm(2, 2 * width), nn.SiLU(inplace=True)
        )
        self.up = nn.ConvTranspose2d(2 * width, width, 2, stride=2)
        self.out = nn.Conv2d(2 * width, classes, 1)

    def forward(self, x):
        skip = self.down(x)
        return self.out(torch.cat([skip, self.up(self.bottom(skip))], dim=1))


class InvertedResidual(nn.Module):
    """MobileNet's block: 1x1 expansion, depthwise 3x3, 1x1 projection, ReLU6 in place, and the input added."""

    def __init__(self, C, expansion=2):
        super().__init__()
        hidden = C * expansion
        self.layers = nn.Sequential(
            nn.Conv2d(C, hidden, 1, bias=False),
            nn.BatchNorm2d(hidden),
            nn.ReLU6(inplace=True),
            nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden, bias=False),
            nn.BatchNorm2d(hidden),
            nn.ReLU6(inplace=True),
            nn.Conv2d(hidden, C, 1, bias=False),
            nn.BatchNorm2d(C),
        )

    def forward(self, x):
        return x + self.layers(x)


class MobileNet(nn.Module):
    def __init__(self, width=3, classes=3):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, width, 3, stride=2, padding=1), nn.ReLU6(inplace=True))
        self.block = InvertedResidual(width)
        self.head = nn.Linear(width, classes)

    def forward(self, x):
        return self.head(self.block(self.stem(x)).mean((2, 3)))


class Unrolled(nn.Module):
    """A recurrent network that applies one Linear 20 times."""

    def __init__(self, width=3, outputs=2, steps=20):
        super().__init__()
        self.inner, self.outer, self.steps = nn.Linear(width, width), nn.Linear(width, outputs), steps

    def forward(self, x):
        for _ in range(self.steps):
            x = torch.tanh(self.inner(x))
        return self.outer(x)


def with_statistics_of_their_own(model):
    """The model in float64 and evaluation mode, with random scales, shifts and running statistics in its norms."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.2)
            module.running_var.uniform_(0.5, 2.0)
        if isinstance(module, (nn.BatchNorm2d, nn.GroupNorm, nn.LayerNorm)):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.2)
    return model.double().eval()
