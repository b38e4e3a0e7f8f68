"""A network of a few weights with XMem's constructor and steps."""

import torch
from torch import nn
from torch.nn import functional as F

from model import resnet
from model.memory_util import *  # noqa: F403


def aggregate(prob):
    """Probabilities (O,H,W) of the objects -> (1+O,H,W) with the background, of sum 1."""
    everything = torch.cat([(1 - prob).prod(0, keepdim=True), prob]).clamp(1e-7, 1 - 1e-7)
    return everything.logit().softmax(0)


class XMem(nn.Module):
    def __init__(self, config, model_path=None, map_location=None):
        super().__init__()
        self.key_encoder = resnet.resnet50(pretrained=True)
        self.value_encoder = resnet.resnet18(pretrained=True, extra_dim=1)
        self.key_proj = nn.Conv2d(16, 17, 1)
        self.decoder = nn.Conv2d(32, 1, 1)
        config.update(key_dim=8, value_dim=16, hidden_dim=0)
        if model_path is not None:
            self.load_state_dict(torch.load(model_path, map_location=map_location))

    def encode_key(self, image):
        features = self.key_encoder(image)
        key, shrinkage, selection = self.key_proj(features).split((8, 1, 8), 1)
        return key, shrinkage.square() + 1, selection.sigmoid(), features

    def encode_value(self, image, masks):
        images = torch.cat([image.expand(len(masks), -1, -1, -1), masks.unsqueeze(1)], 1)
        return self.value_encoder(images).unsqueeze(0)

    def read_memory(self, query_key, query_selection, memory_key, memory_shrinkage, memory_value):
        batch, objects = memory_value.shape[:2]
        affinity = get_affinity(memory_key, memory_shrinkage, query_key, query_selection)  # noqa: F405
        memory = readout(affinity, memory_value.flatten(1, 2))  # noqa: F405
        return memory.unflatten(1, (objects, -1)).view(batch, objects, -1, *memory.shape[-2:])

    def segment(self, features, read):
        logits = self.decoder(torch.cat([features.expand(len(read), -1, -1, -1), read], 1))
        return aggregate(F.interpolate(4 * logits, scale_factor=16.0, mode="bilinear")[:, 0].sigmoid())
