"""Keys shared by all objects, values by groups of objects that appeared together."""

import torch


class KeyValueMemoryStore:
    def __init__(self):
        self.k = self.s = self.e = self.use_count = self.life_count = None
        self.v = []
        self.groups = []

    def add(self, key, shrinkage, selection, values):
        parts = (key, shrinkage, selection, torch.zeros_like(shrinkage), torch.full_like(shrinkage, 1e-7))
        names = ("k", "s", "e", "use_count", "life_count")
        for name, part in zip(names, parts):
            before = getattr(self, name)
            setattr(self, name, part if before is None else torch.cat([before, part], -1))
        for group, value in enumerate(values):
            if group < len(self.v):
                self.v[group] = torch.cat([self.v[group], value], -1)
            else:
                self.v.append(value)

    def keep(self, kept):
        """Keep the positions of a boolean mask; a group's values belong to the last positions."""
        for name in ("k", "s", "e", "use_count", "life_count"):
            setattr(self, name, getattr(self, name)[:, :, kept])
        self.v = [value[:, :, kept[-value.shape[2] :]] for value in self.v]

    def update_usage(self, usage):
        self.use_count += usage.view_as(self.use_count)
        self.life_count += 1

    @property
    def usage(self):
        return (self.use_count / self.life_count).flatten()

    @property
    def size(self):
        return 0 if self.k is None else self.k.shape[2]
