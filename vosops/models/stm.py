"""STM: space-time memory networks (Oh, Lee, Xu and Kim, ICCV 2019).

Every object has a memory of keys and values of past frames, made by an encoder that sees the frame, the object's soft
mask and that of the others. A new frame's key reads them (`vosops.memory_read`), and a decoder makes the object's mask
of what was read. Objects are fused by `vosops.soft_aggregate`. docs/models/stm.md has the diagram.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from vosops import _checks
from vosops.memory import MemoryBank, MemoryBudgetError, MemorySettings
from vosops.models.convolution import Conv3x3
from vosops.models.network import Masks, Memory, Network, objects_together, one_mask_each, resize_rows
from vosops.models.resnet import ResNet50Encoder
from vosops.ops import memory_read, soft_aggregate

__all__ = ["STM"]

_KEY, _VALUE = 128, 512  # channels
_R4, _R3, _R2 = 1024, 512, 256  # channels of the encoders' maps at strides 16, 8 and 4
_DECODER = 256  # channels
_MASK_STRIDE = 4  # of the decoder's output
_STRIP_PIXELS = 1 << 20  # of the frame whose last decoder stage is computed together
_HALO = 3  # rows that three 3x3 convolutions see beside their own


class STM(Network):
    """STM's network; `create_tracker` tracks objects with it, `forward` trains it.

    slots: the classes among which probabilities are divided: the original has always 11, so that it takes 10 objects at
    most, and what is not there keeps a probability of about 1e-7; None: as many as there are, any number.
    memory_dtype: of the values that the memory stores: float32; float16, bfloat16 or int8 for half or a quarter of the
    bytes. Parameters are named as in the official checkpoint (STM_weights.pth), which `create_model("stm", weights)`
    loads. Batch norm keeps its statistics in training, too.

    Memory beside the weights: 2560 bytes for 16 x 16 pixels of each object and frame that is kept, in a `MemoryBank`,
    and less than 1 KB for each pixel of the frame, whatever the number of objects and frames. Time: an encoder pass for
    the frame, and for each object an encoder pass, a read of all of its memory and a decoder.
    """

    stride = 16
    channels_last = True

    def __init__(self, *, slots: int | None = None, memory_dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.memory_settings = MemorySettings(similarity="dot", dtype=memory_dtype)
        self.slots = None if slots is None else _checks.check_positive_int("slots", slots, 2)
        self.Encoder_M = ResNet50Encoder(("m", "o"), last_stage=4, mask_bias=False)
        self.Encoder_Q = ResNet50Encoder((), last_stage=4)
        self.KV_M_r4 = _KeyValue()
        self.KV_Q_r4 = _KeyValue()
        self.Decoder = _Decoder()

    def forward(self, frames: Tensor, masks: Tensor) -> Tensor:
        """Track objects through clips, with gradients: for training.

        frames (N,T,3,H,W) in [0, 1], H and W multiples of 16; masks (N,O,H,W) of the first frame, in [0, 1]. The memory
        of each frame is all earlier ones, with the soft masks that were estimated there. Returns the logits
        (N,T-1,1+O,H,W) float32 of background and objects in frames 1 and on, for cross entropy.

            >>> import torch
            >>> from vosops.models import STM
            >>> model = STM()
            >>> logits = model(torch.rand(1, 3, 3, 32, 32), torch.rand(1, 2, 32, 32).round())
            >>> labels = torch.zeros(1, 2, 32, 32, dtype=torch.long)
            >>> torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(0, 1)).backward()
        """
        _checks.check_tensor("frames", frames, ("N", "T", 3, "H", "W"))
        _checks.check_tensor("masks", masks, (frames.shape[0], "O", *frames.shape[3:]))
        for name, x in (("frames", frames), ("masks", masks)):
            _checks.check_floating(name, x)
        if frames.shape[1] < 2 or any(side % self.stride for side in frames.shape[3:]):
            raise ValueError(
                f"frames must be at least two, of sides that are multiples of {self.stride}, "
                f"got {tuple(frames.shape)}"
            )
        batch, objects = masks.shape[:2]
        keys: list[Tensor] = []
        values: list[Tensor] = []
        logits = []
        for last, frame in zip(frames.unbind(1), frames.unbind(1)[1:], strict=False):
            others = (masks.sum(1, keepdim=True) - masks).clamp(0, 1)
            every = last.repeat_interleave(objects, 0)
            key, value = self.memorise(every, masks.flatten(0, 1), others.flatten(0, 1))
            keys.append(key)
            values.append(value)
            query = self.query(frame)
            read = memory_read(query.key.repeat_interleave(objects, 0), keys, values)
            shared = (query.value, query.skip3, self.Decoder.RF2.skip(query.r2))
            scores = self.Decoder(read, *(x.repeat_interleave(objects, 0) for x in shared))
            apart = functional.interpolate(scores[:, None], frame.shape[2:], mode="bilinear").sigmoid()
            logits.append(soft_aggregate(apart.view(batch, objects, *frame.shape[2:]), return_logits=True))
            masks = logits[-1].softmax(1)[:, 1:]
        return torch.stack(logits, 1)

    def clip_logits(self, frames: Tensor, labels: Tensor, objects: int) -> Tensor:
        """See :class:`vosops.models.Network`: the first frame's labels are given."""
        logits: Tensor = self(frames, one_mask_each(labels[:, 0], objects))
        return logits

    def memorise(self, image: Tensor, masks: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
        """Return keys (O,128,h/16,w/16) and values (O,512,h/16,w/16) of objects in a frame.

        image (1,3,h,w) or (O,3,h,w); masks and others (O,h,w): each object's and those of all others together.
        """
        key, value = self.KV_M_r4(self.Encoder_M.last(image, masks, others))
        return key, value

    def query(self, image: Tensor) -> Query:
        """Encode what all objects share of a frame (N,3,h,w)."""
        r2, r3, r4 = self.Encoder_Q(image)
        key, value = self.KV_Q_r4(r4)
        return Query(key, value, self.Decoder.RF3.skip(r3), r2)

    def new_memory(self, *, budget: int | None = None, naive: bool = False) -> Memory:
        """Return an empty memory: one `MemoryBank` for each object, or tensors that grow by concatenation."""
        return _NaiveMemory(self) if naive else _BankMemory(self, budget)

    def evidence(self, scores: Tensor, size: tuple[int, int], rows: range) -> Tensor:
        """Return the probabilities (O,len(rows),w) of each object against all else."""
        return resize_rows(scores, size, rows).sigmoid_()

    def aggregate(self, evidence: Tensor) -> Tensor:
        """Soft aggregation."""
        return soft_aggregate(evidence, slots=self.slots)


class Query(NamedTuple):
    """What of a frame all objects share: key, value, what the decoder takes from stride 8, and the map of stride 4."""

    key: Tensor
    value: Tensor
    skip3: Tensor
    r2: Tensor


class _ObjectMemory(Memory):
    """What the two kinds of memory share; `object_ids` is the order of the masks that were added last."""

    def __init__(self, network: STM) -> None:
        self.network = network
        self.object_ids = []

    @abstractmethod
    def store(
        self, object_id: int, key: Tensor, value: Tensor, *, frame: int, permanent: bool, keep: bool
    ) -> None:
        """Remembers an object's key and value (1,C,h,w) of a frame, as `add` says."""

    def _memorised(self, image: Tensor, masks: Masks, together: int) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Yield object id, key and value (1,C,h,w) of each object, encoded in groups."""
        ids = masks.object_ids
        total = torch.zeros(masks.size, device=image.device)
        for i in range(len(ids)):
            total += masks.of(1 + i)
        for start in range(0, len(ids), together):
            some = ids[start : start + together]
            own = torch.stack([masks.of(1 + start + i) for i in range(len(some))])
            keys, values = self.network.memorise(image, own, (total - own).clamp_(0, 1))
            yield from zip(some, keys.split(1), values.split(1), strict=True)


class _BankMemory(_ObjectMemory):
    """One `MemoryBank` for each object, which share the budget; a few objects are computed at a time."""

    def __init__(self, network: STM, budget: int | None) -> None:
        super().__init__(network)
        self.budget = budget
        self._banks: dict[int, MemoryBank] = {}

    def add(self, image: Tensor, masks: Masks, *, frame: int, permanent: bool, keep: bool) -> None:
        settings = self.network.memory_settings
        new = {o: MemoryBank(settings, device=image.device) for o in masks.object_ids if o not in self._banks}
        objects = len(self._banks) + len(new)
        try:
            self._share(objects, new)
            self._banks |= new
            for o, key, value in self._memorised(image, masks, objects_together(image)):
                self.store(o, key, value, frame=frame, permanent=permanent, keep=keep)
        except MemoryBudgetError as error:
            self._banks = {o: bank for o, bank in self._banks.items() if o not in new}
            self._share(len(self._banks), {})
            if error.needed is None:
                raise
            what = f"{error.what} of {objects} objects"
            raise MemoryBudgetError.of(error.needed * objects, what, self.budget, error.fit) from error
        self.object_ids = list(masks.object_ids)

    def store(
        self, object_id: int, key: Tensor, value: Tensor, *, frame: int, permanent: bool, keep: bool
    ) -> None:
        temporary = not (keep or permanent)
        bank = self._banks[object_id]
        bank.add(frame, key, value[None], [object_id], permanent=permanent, temporary=temporary)

    def segment(self, image: Tensor, *, frame: int) -> Tensor:
        query, decoder = self.network.query(image), self.network.Decoder
        together = objects_together(image)
        middles = []
        for start in range(0, len(self.object_ids), together):
            some = self.object_ids[start : start + together]
            read = torch.cat([self._banks[o].read(query.key)[0] for o in some])
            middles.append(decoder.middle(read, query.value.expand(len(some), -1, -1, -1), query.skip3))
        return decoder.in_strips(middles, query.r2)

    def remove_object(self, object_id: int) -> None:
        self.object_ids.remove(object_id)
        del self._banks[object_id]
        self._share(len(self._banks), {})

    def state_dict(self) -> dict[str, Any]:
        banks = {str(o): bank.state_dict() for o, bank in self._banks.items()}
        return {"object_ids": list(self.object_ids), "banks": banks}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.object_ids = list(state["object_ids"])
        device = next(self.network.parameters()).device
        settings = replace(self.network.memory_settings, budget=self._budget_of_each(len(state["banks"])))
        self._banks = {int(o): MemoryBank(settings, device=device) for o in state["banks"]}
        for o, bank in self._banks.items():
            bank.load_state_dict(state["banks"][str(o)])

    def memory_bytes(self) -> int:
        return sum(bank.bytes_reserved for bank in self._banks.values())

    def _budget_of_each(self, objects: int) -> int | None:
        return None if self.budget is None else max(1, self.budget // max(1, objects))

    def _share(self, objects: int, new: Mapping[int, MemoryBank]) -> None:
        """Divide the budget among this many objects; on a MemoryBudgetError nothing changes."""
        budget = self._budget_of_each(objects)
        before = [(bank, bank.settings.budget) for bank in self._banks.values()]
        try:
            for bank in [*self._banks.values(), *new.values()]:
                bank.set_budget(budget)
        except MemoryBudgetError:
            for bank, old in before:
                bank.set_budget(old)
            raise


class _NaiveMemory(_ObjectMemory):
    """As the original remembers: all objects stacked, concatenated anew for each frame, everything at full size."""

    def __init__(self, network: STM) -> None:
        super().__init__(network)
        self._keys: dict[int, Tensor] = {}  # (1,128,T,h,w) of each object
        self._values: dict[int, Tensor] = {}
        self._temporary: set[int] = set()  # the objects whose last frame is replaced by the next one

    def add(self, image: Tensor, masks: Masks, *, frame: int, permanent: bool, keep: bool) -> None:
        for o, key, value in list(self._memorised(image, masks, len(masks.object_ids))):
            self.store(o, key, value, frame=frame, permanent=permanent, keep=keep)
        self.object_ids = list(masks.object_ids)

    def store(
        self, object_id: int, key: Tensor, value: Tensor, *, frame: int, permanent: bool, keep: bool
    ) -> None:
        for columns, new in ((self._keys, key), (self._values, value)):
            before = []
            if object_id in columns:
                stays = object_id not in self._temporary
                before = [columns[object_id] if stays else columns[object_id][:, :, :-1]]
            columns[object_id] = torch.cat([*before, new[:, :, None]], 2)
        self._temporary = (
            self._temporary - {object_id} if permanent or keep else self._temporary | {object_id}
        )

    def segment(self, image: Tensor, *, frame: int) -> Tensor:
        network, objects = self.network, len(self.object_ids)
        r2, r3, r4 = network.Encoder_Q(image)
        key, value = (x.expand(objects, -1, -1, -1) for x in network.KV_Q_r4(r4))
        if len({self._keys[o].shape[2] for o in self.object_ids}) == 1:
            keys, values = (torch.cat([s[o] for o in self.object_ids]) for s in (self._keys, self._values))
            read = memory_read(key, keys, values)
        else:
            reads = [memory_read(key[:1], self._keys[o], self._values[o]) for o in self.object_ids]
            read = torch.cat(reads)
        decoder = network.Decoder
        skips = (
            decoder.RF3.skip(r3.expand(objects, -1, -1, -1)),
            decoder.RF2.skip(r2.expand(objects, -1, -1, -1)),
        )
        scores: Tensor = decoder(read, value, *skips)
        return scores

    def remove_object(self, object_id: int) -> None:
        self.object_ids.remove(object_id)
        del self._keys[object_id], self._values[object_id]
        self._temporary.discard(object_id)

    def state_dict(self) -> dict[str, Any]:
        return {
            "object_ids": list(self.object_ids),
            "keys": [self._keys[o].clone() for o in self.object_ids],
            "values": [self._values[o].clone() for o in self.object_ids],
            "temporary": sorted(self._temporary),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        device = next(self.network.parameters()).device
        self.object_ids = list(state["object_ids"])
        self._temporary = set(state["temporary"])
        self._keys, self._values = (
            {o: x.to(device, copy=True) for o, x in zip(self.object_ids, state[name], strict=True)}
            for name in ("keys", "values")
        )

    def memory_bytes(self) -> int:
        stores = [*self._keys.values(), *self._values.values()]
        return sum(x.numel() * x.element_size() for x in stores)


class _KeyValue(nn.Module):
    """Key and value of a frame."""

    def __init__(self) -> None:
        super().__init__()
        self.Key = Conv3x3(_R4, _KEY)
        self.Value = Conv3x3(_R4, _VALUE)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.Key(x), self.Value(x)


class _ResBlock(nn.Module):
    """Two 3x3 convolutions, each after a ReLU, and the input added."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = Conv3x3(_DECODER, _DECODER)
        self.conv2 = Conv3x3(_DECODER, _DECODER)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv2(self.conv1(functional.relu(x), relu=True), x)
        return y


class _Refine(nn.Module):
    """What the coarser stage found, enlarged, with the frame's own map of this stride."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.convFS = Conv3x3(inputs, _DECODER)
        self.ResFS = _ResBlock()
        self.ResMM = _ResBlock()

    def skip(self, features: Tensor) -> Tensor:
        """Return what this stage takes from the frame's map, which all objects share."""
        out: Tensor = self.ResFS(self.convFS(features))
        return out

    def forward(self, skip: Tensor, coarse: Tensor) -> Tensor:
        m = functional.interpolate(coarse, scale_factor=2, mode="bilinear", align_corners=False)
        out: Tensor = self.ResMM(m + skip)
        return out


class _Decoder(nn.Module):
    """From what was read to scores: the logit of an object minus that of all else, at stride 4."""

    def __init__(self) -> None:
        super().__init__()
        self.convFM = Conv3x3(2 * _VALUE, _DECODER)
        self.ResMM = _ResBlock()
        self.RF3 = _Refine(_R3)
        self.RF2 = _Refine(_R2)
        self.pred2 = nn.Conv2d(_DECODER, 2, 3, padding=1)

    def forward(self, read: Tensor, value: Tensor, skip3: Tensor, skip2: Tensor) -> Tensor:
        """Read and value (O,512,h,w), skips of `_Refine.skip` (O or 1,256,...) -> (O,4h,4w)."""
        return self._scores(self.RF2(skip2, self.middle(read, value, skip3)))

    def middle(self, read: Tensor, value: Tensor, skip3: Tensor) -> Tensor:
        """Return the stages up to stride 8 -> (O,256,2h,2w)."""
        m: Tensor = self.ResMM(self.convFM(torch.cat([read, value], 1)))
        m = self.RF3(skip3, m)
        return m

    def in_strips(self, middles: Sequence[Tensor], r2: Tensor) -> Tensor:
        """Return the last stage a few rows at a time, after that of `middle` for some objects each -> (O,4h,4w).

        The same as `forward`, but for rounding: a strip's maps are made with the rows around it that they depend on.
        """
        height, width = r2.shape[2:]
        rows = max(4 * _HALO, _STRIP_PIXELS // (_MASK_STRIDE**2 * width))
        strips = []
        for start in range(0, height, rows):
            stop = min(start + rows, height)
            first, last = max(start - _HALO, 0), min(stop + _HALO, height)
            top, bottom = max(first - _HALO, 0), min(last + _HALO, height)
            skip = self.RF2.skip(r2[:, :, top:bottom])[:, :, first - top : last - top]
            parts = []
            for middle in middles:
                coarse = resize_rows(middle.flatten(0, 1), (height, width), range(first, last))
                m = skip + coarse.view(*middle.shape[:2], last - first, width).to(skip.dtype)
                parts.append(self._scores(self.RF2.ResMM(m))[:, start - first : stop - first])
            strips.append(torch.cat(parts))
        return torch.cat(strips, 1)

    def _scores(self, m: Tensor) -> Tensor:
        logits: Tensor = self.pred2(functional.relu(m))
        return logits[:, 1] - logits[:, 0]
