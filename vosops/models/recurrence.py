"""ConvLSTMs at named places of a network that segments frames, and its `forward` through time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from vosops.nn import ConvLSTM, ConvLSTMCell

if TYPE_CHECKING:
    from vosops.models.semantic_network import FrameNetwork

__all__ = ["Recurrent", "State", "Time", "build_layers", "layer_options", "run_layer", "through_time"]

State = dict[str, tuple[Tensor, Tensor]]
"""Hidden and cell of each recurrent layer, by its name: (N,C,h,w), or (L,N,C,h,w) of a ConvLSTM of L layers."""

Recurrent = str | Sequence[str] | Mapping[str, str | Mapping[str, Any]]
"""Places of ConvLSTMs, see `layer_options`."""

_VARIANT = "variant"


@dataclass
class Time:
    """What a run through time knows beside the frames.

    length: frames of each clip; all of them follow each other in the batch. before: the state that clips begin with,
    zeros if None. after: what they end with, filled by the layers. windows: whether the clips of `before` are one
    video's, each begun a frame after the one before it, of which the first one's result is wanted.
    """

    length: int = 1
    before: State | None = None
    after: State = field(default_factory=dict)
    windows: bool = False

    def run(self, place: str, layer: ConvLSTM, x: Tensor) -> Tensor:
        """(N*length,C,h,w) through the layer at a place."""
        before = None if self.before is None else self.before[place]
        frames = x.unflatten(0, (-1, self.length))
        if self.windows and before is not None:
            frames = frames.expand(before[0].shape[1], *[-1] * (frames.ndim - 1))
        hidden, self.after[place] = layer(frames, before)
        found: Tensor = hidden[:1] if self.windows else hidden
        return found.flatten(0, 1)


def layer_options(recurrent: Recurrent | None, places: Mapping[str, int]) -> dict[str, dict[str, Any]]:
    """Return the options of the ConvLSTM at each place that is named.

    recurrent: a place, several separated by commas, each with its variant if one follows a colon
    ("bottleneck:separable,head"); a list of places; or a dictionary of variants or of options of
    :class:`vosops.nn.ConvLSTM` by place. places: those that there are, and the channels of their maps. Raises
    ValueError for any other place, TypeError for anything else.
    """
    if recurrent is None:
        return {}
    if isinstance(recurrent, str):
        pairs = (text.strip().partition(":") for text in recurrent.split(","))
        given: dict[str, Any] = {place: variant or {} for place, _, variant in pairs}
    elif isinstance(recurrent, Mapping):
        given = dict(recurrent)
    elif isinstance(recurrent, Sequence):
        given = {place: {} for place in recurrent}
    else:
        raise TypeError(
            f"recurrent must be places or a dictionary of options by place, got {type(recurrent).__name__}"
        )
    for place in given:
        if place not in places:
            raise ValueError(f"recurrent must name places among {', '.join(places)}, got {place!r}")
    return {
        place: {_VARIANT: value} if isinstance(value, str) else dict(value) for place, value in given.items()
    }


def build_layers(options: Mapping[str, Mapping[str, Any]], places: Mapping[str, int]) -> nn.ModuleDict:
    """Build a ConvLSTM for each place, whose map it reads and replaces."""
    return nn.ModuleDict(
        {place: ConvLSTM(places[place], places[place], **chosen) for place, chosen in options.items()}
    )


def run_layer(
    layers: nn.ModuleDict, name: str, x: Tensor, length: int, state: State | None, new: State
) -> Tensor:
    """(N*length,C,h,w) through the `ConvLSTMCell` of this name, if there is one; its state is put into `new`."""
    if name not in layers:
        return x
    layer = layers[name]
    assert isinstance(layer, ConvLSTMCell)
    hidden, new[name] = layer.run(x.unflatten(0, (-1, length)), None if state is None else state[name])
    return hidden.flatten(0, 1)


def through_time(compute: Callable[[Any, Tensor], Any]) -> Callable[..., Any]:
    """Make the `forward` of a `FrameNetwork` of a function of images (N,C,H,W), which are of sides that it takes.

    It computes by rows where it may. Where ConvLSTMs are at some of the network's places, it takes a step, images
    (N,C,H,W), or clips (N,T,C,H,W), and a state, and returns what the function does and the state.
    """

    def forward(network: FrameNetwork, images: Tensor, state: State | None = None) -> Any:
        if not network.recurrent or network.time is not None:
            if state is not None:
                raise ValueError(
                    "state must be None: the network has no recurrent place, got a state of "
                    + ", ".join(state)
                )
            return _alone(network, images, compute)
        is_clip = images.ndim == _CLIP_NDIM
        length = images.shape[1] if is_clip else 1
        with network.during(Time(length, state)) as time:
            found = _alone(network, images.flatten(0, 1) if is_clip else images, compute)
        return (_unflattened(found, length) if is_clip else found), time.after

    forward.__doc__ = compute.__doc__
    return forward


_CLIP_NDIM = 5


def _alone(network: FrameNetwork, images: Tensor, compute: Callable[[Any, Tensor], Any]) -> Any:
    """Return what a network makes of images, as rows where it may."""
    network.sides.check(images)
    return network.rows(images).whole() if network.streams else compute(network, images)


def _unflattened(found: Any, length: int) -> Any:
    """Return logits (N*length,K,h,w), or several of them, as (N,length,K,h,w)."""
    if isinstance(found, Tensor):
        return found.unflatten(0, (-1, length))
    return type(found)(_unflattened(x, length) for x in found)
