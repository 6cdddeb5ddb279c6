"""The transformer that follows the residual blocks of latent-diffusion U-Nets."""

from __future__ import annotations

from typing import Any

import flax.linen as nn

from diffjax.networks.attention import Attention
from diffjax.networks.layers import Dense, GroupNorm, LayerNorm, mark_layer, repeat
from diffjax.networks.partition import constrain
from diffjax.networks.taps import Tap


class TransformerBlock(nn.Module):
    """Attention, attention to tokens, gated MLP, each as x + f(norm(x)).   MLP: W (a gelu(b)),  a = A x,  b = B x

    Taps: `attention/...`, `cross/...`, `block`.
    Reference: Rombach et al. 2022, arXiv:2112.10752, appendix E.2; Shazeer 2020, arXiv:2002.05202 (GEGLU).
    """

    heads: int
    expand: int
    dtype: Any
    only_tokens: bool = False  # the first attention is to the tokens too

    @nn.compact
    def __call__(self, x: Any, layer: Any, tokens: Any, mask: Any) -> tuple[Any, None]:
        """One block; see `layers.repeat` for the form."""
        mark_layer(layer)
        n = x.shape[-1]
        biases = dict(qkv_bias=False, out_bias=True, dtype=self.dtype)
        first = (tokens, mask) if self.only_tokens else ()
        x = x + Attention(self.heads, **biases, name="attention")(LayerNorm(name="norm_attention")(x), *first)
        if tokens is not None:
            x = x + Attention(self.heads, **biases, name="cross")(LayerNorm(name="norm_cross")(x), tokens, mask)
        h = LayerNorm(name="norm_mlp")(x)
        gate = nn.gelu(Dense(self.expand * n, dtype=self.dtype, name="gate")(h), approximate=False)
        h = constrain(Dense(self.expand * n, dtype=self.dtype, name="hidden")(h) * gate, "batch", "some_tokens", "wide")
        x = constrain(x + Dense(n, dtype=self.dtype, name="out")(h), "batch", "some_tokens", None)
        return Tap(name="block")(x), None


def transformer(
    x: Any,
    tokens: Any,
    mask: Any,
    *,
    heads: int,
    dtype: Any,
    depth: int = 1,
    expand: int = 4,
    remat: str = "none",
    norm: Any = GroupNorm,
    only_tokens: bool = False,
) -> Any:
    """`depth` transformer blocks over all places, between linear maps.   x + W_out blocks(W_in norm(x)), W_out from zero

    A part for `UNet(mix=...)`.
    Args: x: [B, *n, c].   tokens, mask: see `attention`.   heads: of both attentions.   remat: of each block.   norm: the
    first.   only_tokens: both attentions are to the tokens.
    Returns: [B, *n, c].

    Reference: Rombach et al. 2022, arXiv:2112.10752, appendix E.2.
    """
    b, n = x.shape[0], x.shape[-1]
    h = norm(name="norm_attention")(x).reshape(b, -1, n)
    h = Dense(n, dtype=dtype, name="proj_in")(h)
    fields = dict(heads=heads, expand=expand, dtype=dtype, only_tokens=only_tokens)
    h = repeat(TransformerBlock, fields, depth, h, (tokens, mask), scan=False, remat=remat)
    return x + Dense(n, zero=True, dtype=dtype, name="proj_out")(h).reshape(x.shape)
