"""A video in steps, by XMem's interface."""

from model.network import XMem, aggregate
from torch.nn import functional as F

from inference.memory_manager import MemoryManager


class InferenceCore:
    def __init__(self, network: XMem, config):
        self.network = network
        self.config = config
        self.all_labels = None
        self.clear_memory()

    def clear_memory(self):
        self.curr_ti = -1
        self.last_mem_ti = 0
        self.memory = MemoryManager(config=self.config)

    def set_all_labels(self, all_labels):
        self.all_labels = all_labels

    def step(self, image, mask=None, valid_labels=None, end=False):
        """image (3,H,W), mask (O,H,W) or None -> (1+O,H,W)."""
        self.curr_ti += 1
        height, width = image.shape[1:]
        padding = (0, -width % 16, 0, -height % 16)
        image = F.pad(image, padding).unsqueeze(0)
        key, shrinkage, selection, features = self.network.encode_key(image)
        if mask is None:
            prob = self.network.segment(features, self.memory.match_memory(key, selection))
        else:
            assert mask.shape[0] == len(self.all_labels) == len(valid_labels)
            prob = aggregate(F.pad(mask, padding))
        if (mask is not None or self.curr_ti - self.last_mem_ti >= self.config["mem_every"]) and not end:
            value = self.network.encode_value(image, prob[1:])
            self.memory.add_memory(key, shrinkage, value, selection)
            self.last_mem_ti = self.curr_ti
        return prob[:, :height, :width]
