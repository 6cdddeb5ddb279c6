"""What a file of this package says of one class of another library."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from diffjax.interop.rules import Rule
from diffjax.networks import from_linen

Config = Mapping[str, Any]


def plain(module: Any, config: Config) -> Any:
    """The module as a function, without other conventions."""
    return from_linen(module)


def as_it_is(module: Any, config: Config, tensors: Any) -> Any:
    """The module of the configuration fits all tensors."""
    return module


def no_buffers(module: Any, config: Config) -> Mapping[str, Any]:
    """Their files hold parameters alone."""
    return {}


class Peer(NamedTuple):
    """A class of another library as networks of ours.

    `network(config)`: our module; every field is read, and what has no counterpart is a ValueError (see `options`).
    `config(module)`: the fields of their configuration, without those that the module does not decide.
    `rules(module)`: how parameters become tensors; `rules(module, config)` if `by_config`, where the configuration decides
    names or forms that do not matter to the module.
    `example(module, config)`: arguments of `module.init` after the key, `ShapeDtypeStruct`s.
    `fn(module, config)`: the function `fn(params, x, t, cond)`, with their conventions of time and condition.
    `latent(module, config)`: of an autoencoder, shift and scale of `latent.LatentSpace`, each [c].
    `fit(module, config, tensors)`: the module for these tensors, where they say more than the configuration.
    `buffers(module, config)`: arrays that are no parameters of ours and yet in their files: written, and not read.
    `unit`: what the network is given for a timestep of one of a scheduler, where pipelines divide it.
    `pieces(config)`: `pieces.Pieces` of a network whose configuration says its process, without a scheduler.
    `ignored`: patterns of tensors that may be there and are not read.   `renames`: patterns of older names, with new ones.
    """

    network: Callable[[Config], Any]
    config: Callable[[Any], dict[str, Any]]
    rules: Callable[..., list[Rule]]
    example: Callable[[Any, Config], tuple]
    fn: Callable[[Any, Config], Any] = plain
    latent: Callable[[Any, Config], tuple[Any, Any]] | None = None
    fit: Callable[[Any, Config, Any], Any] = as_it_is
    buffers: Callable[[Any, Config], Mapping[str, Any]] = no_buffers
    ignored: tuple[str, ...] = ()
    renames: tuple[tuple[str, str], ...] = ()
    by_config: bool = False
    pieces: Callable[[Config], Any] | None = None
    unit: float = 1.0

    def table(self, module: Any, config: Config) -> list[Rule]:
        """The rules of a module with a configuration."""
        return self.rules(module, config) if self.by_config else self.rules(module)
