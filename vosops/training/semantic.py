"""Training of networks that find the class of every pixel, of images and of clips."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from vosops.inference.semantic_tracker import SemanticTracker
from vosops.inference.settings import DTYPES
from vosops.io.resize import computation_size, resize_frame
from vosops.metrics import class_iou, confusion_matrix
from vosops.models.semantic_network import FrameNetwork, SemanticNetwork
from vosops.training.clips_task import ClipTask
from vosops.training.config import Source
from vosops.training.loading import Batch
from vosops.training.objectives import sample_loss
from vosops.training.sources import AnnotatedFrames, Decoded, meant, sequences_of

__all__ = ["SemanticTask"]


class SemanticTask(ClipTask):
    """Trains a :class:`vosops.models.SemanticNetwork` by its `supervised`.

    The loss of a clip is that of each of the network's outputs, by their weights. The score is the mean IoU, as
    ``vosops eval --task semantic`` computes it, over all held-out images and videos.
    """

    objects = False

    def side(self, wanted: int) -> int:
        """See :class:`ClipTask`."""
        network = self.network
        assert isinstance(network, SemanticNetwork)
        wanted = max(wanted, network.min_side)
        return network.sides.at_least(wanted) if isinstance(network, FrameNetwork) else wanted

    def loss(self, network: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, float]]:
        """See :class:`Task`."""
        outputs = self._outputs(network, batch)
        step, total = self.step_of(batch), torch.zeros((), device=batch.frames.device)
        for weight, logits in outputs:
            truth = batch.labels[:, -logits.shape[1] :]
            losses = [sample_loss(x, y, self.config.loss, step) for x, y in zip(logits, truth, strict=True)]
            total = total + weight * torch.stack(losses).mean()
        return total, {}

    def _outputs(self, network: nn.Module, batch: Batch) -> list[tuple[float, Tensor]]:
        if not isinstance(network, SemanticNetwork):
            raise TypeError(f"network must be a SemanticNetwork, got {type(network).__name__}")
        outputs = network.supervised(self.frames_of(batch))
        weights = self.config.loss.outputs
        if weights is None:
            return outputs
        if len(weights) != len(outputs):
            raise ValueError(f"loss.outputs must be {len(outputs)} weights, got {len(weights)}")
        return [(weight, logits) for weight, (_, logits) in zip(weights, outputs, strict=True)]

    def predicted(self, network: nn.Module, batch: Batch) -> Tensor:
        """See :class:`ClipTask`."""
        return torch.stack([self._labels(network, list(frames)) for frames in batch.frames])

    def _labels(self, network: nn.Module, frames: list[Tensor]) -> Tensor:
        """Return the labels (H,W) of the last frame of a clip."""
        tracker = self._tracker(network)
        for frame in frames:
            labels = tracker.step(frame, output="labels")
        return labels.to(torch.uint8)

    def _tracker(self, network: nn.Module) -> SemanticTracker:
        assert isinstance(network, SemanticNetwork)
        return SemanticTracker(network, dtype=DTYPES[self.config.precision])

    def evaluate(self, network: nn.Module, out: Path) -> dict[str, float]:
        """See :class:`Task`: "score", the mean IoU, "accuracy", and the IoU of each class."""
        matrix = None
        decoded = Decoded(0)
        for source in self.config.data.held_out.sources:
            for sequence in self._chosen(source):
                tracker = self._tracker(network)
                for image, labels in sequence.frames:
                    frame, truth = decoded.read(image, labels, None)
                    truth = meant(truth, source, binary=bool(source.binary))
                    truth = truth.where(truth < tracker.num_classes, 255)
                    found = tracker.step(
                        self._resized(frame), output="labels", size=(truth.shape[0], truth.shape[1])
                    )
                    counted = confusion_matrix(found.cpu().numpy(), truth.numpy(), tracker.num_classes)
                    matrix = counted if matrix is None else matrix + counted
        if matrix is None:
            return {}
        iou = class_iou(matrix)
        return {
            "score": float(np.nanmean(iou)),
            "accuracy": float(np.diagonal(matrix).sum() / max(1, matrix.sum())),
            **{f"class {number}": float(value) for number, value in enumerate(iou)},
        }

    def _chosen(self, source: Source) -> list[AnnotatedFrames]:
        """Return the videos, or the stills, that are scored."""
        most = self.config.data.held_out.frames
        found = sequences_of(source)
        if most is None:
            return found
        if source.kind == "stills":
            return [found[n * len(found) // most] for n in range(min(most, len(found)))]
        return [AnnotatedFrames(x.name, x.frames[:most]) for x in found]

    def _resized(self, frame: Tensor) -> Tensor:
        size = (frame.shape[1], frame.shape[2])
        return resize_frame(frame, computation_size(size, self.config.data.held_out.size))
