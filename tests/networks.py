"""Small copies of well-known architectures, written the way users write them: in place, fused, tied, unrolled."""

import torch
from torch import nn
from torch.nn import functional


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with batch norms, ReLU in place, and the identity added in place."""

    def __init__(self, C_in, C_out, stride=1):
        super().__init__()
        self.conv1 = nn.Conv2d(C_in, C_out, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(C_out)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(C_out, C_out, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(C_out)
        self.downsample = None
        if stride != 1 or C_in != C_out:
            self.downsample = nn.Sequential(nn.Conv2d(C_in, C_out, 1, stride=stride, bias=False), nn.BatchNorm2d(C_out))

    def forward(self, x):
        identity = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)


class ResNet18(nn.Module):
    """ResNet-18 (He et al. 2016) for images (N, 3, S, S): 64 channels are ``width`` here."""

    def __init__(self, width=4, classes=3):
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        self.layer1 = self._stage(width, width, 1)
        self.layer2 = self._stage(width, 2 * width, 2)
        self.layer3 = self._stage(2 * width, 4 * width, 2)
        self.layer4 = self._stage(4 * width, 8 * width, 2)
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(8 * width, classes)

    def _stage(self, C_in, C_out, stride):
        return nn.Sequential(BasicBlock(C_in, C_out, stride), BasicBlock(C_out, C_out))

    def forward(self, x):
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(torch.flatten(self.avgpool(x), 1))


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
