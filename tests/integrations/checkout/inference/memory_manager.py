"""Working and long-term memory, read with the calls, slices and concatenations that XMem's manager makes."""

import torch
from model.memory_util import *  # noqa: F403

from inference.kv_memory_store import KeyValueMemoryStore


class MemoryManager:
    def __init__(self, config):
        self.config = config
        self.top_k = config["top_k"]
        self.enable_long_term = config["enable_long_term"]
        self.work_mem = KeyValueMemoryStore()
        self.long_mem = KeyValueMemoryStore()
        self.HW = None

    def match_memory(self, key, selection):
        """key, selection (1,C,H,W) -> (objects,Cv,H,W)."""
        shape = key.shape[-2:]
        key, selection = key.flatten(2), selection.flatten(2)
        work, long = self.work_mem, self.long_mem
        if long.size:
            keys, shrinkage = torch.cat([long.k, work.k], -1), torch.cat([long.s, work.s], -1)
            similarity = get_similarity(keys, shrinkage, key, selection)  # noqa: F405
            old, new = similarity[:, : long.size], similarity[:, long.size :]
            affinities = []
            for group, value in enumerate(work.v):
                scores = new[:, -value.shape[2] :]
                if group < len(long.v):
                    scores = torch.cat([old[:, -long.v[group].shape[2] :], scores], 1)
                affinities.append(do_softmax(scores, top_k=self.top_k, inplace=True, return_usage=group == 0))  # noqa: F405
            affinities[0], usage = affinities[0]
            work.update_usage(usage[:, long.size :])
            long.update_usage(usage[:, : long.size])
            values = [
                torch.cat([long.v[group], value], -1) if group < len(long.v) else value
                for group, value in enumerate(work.v)
            ]
        else:
            similarity = get_similarity(work.k, work.s, key, selection)  # noqa: F405
            affinity, usage = do_softmax(similarity, top_k=self.top_k, return_usage=True)  # noqa: F405
            work.update_usage(usage)
            affinities = [affinity]
            for value in work.v[1:]:
                affinities.append(do_softmax(similarity[:, -value.shape[2] :], top_k=self.top_k))  # noqa: F405
            values = work.v
        read = torch.cat([value @ affinity for affinity, value in zip(affinities, values)], 0)
        return read.view(*read.shape[:2], *shape)

    def add_memory(self, key, shrinkage, value, selection):
        """value (1,objects,Cv,H,W): objects beyond those that are known are a new group."""
        self.HW = key.shape[-2:].numel()
        work = self.work_mem
        known = sum(work.groups)
        if value.shape[1] > known:
            work.groups.append(value.shape[1] - known)
        values = value[0].flatten(2).split(work.groups)
        work.add(key.flatten(2), shrinkage.flatten(2), selection.flatten(2), values)
        limit = self.config["max_mid_term_frames"] * self.HW
        if self.enable_long_term and work.size >= limit:
            room = self.config["max_long_term_elements"] - self.config["num_prototypes"]
            if self.long_mem.size > room:
                order = self.long_mem.usage.argsort(descending=True)
                kept = torch.zeros_like(order, dtype=torch.bool)
                kept[order[:room]] = True
                self.long_mem.keep(kept)
            self.compress_features()

    def compress_features(self):
        work = self.work_mem
        stop = work.size - (self.config["min_mid_term_frames"] - 1) * self.HW
        kept = torch.ones(work.size, dtype=torch.bool)
        kept[self.HW : stop] = False
        candidates = (~kept).nonzero().flatten()
        key, shrinkage, selection = (x[:, :, candidates] for x in (work.k, work.s, work.e))
        chosen = work.usage[candidates].topk(self.config["num_prototypes"]).indices
        similarity = get_similarity(key, shrinkage, key[:, :, chosen], selection[:, :, chosen])  # noqa: F405
        values = []
        for value in work.v:
            start = work.size - value.shape[2]
            inside = value[:, :, max(self.HW - start, 0) : stop - start] if stop > start else value[:, :, :0]
            if not inside.shape[2]:
                continue
            valid = chosen >= len(candidates) - inside.shape[2]
            affinity = do_softmax(similarity[:, -inside.shape[2] :, valid])  # noqa: F405
            if affinity.shape[-1] > 0:
                values.append(inside @ affinity)
        affinity = do_softmax(similarity)  # noqa: F405
        self.long_mem.add(key[:, :, chosen], shrinkage @ affinity, selection[:, :, chosen], values)
        work.keep(kept)
