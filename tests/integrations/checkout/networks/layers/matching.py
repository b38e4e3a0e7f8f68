"""CFBI's matching as its users call it: same names, arguments and layouts, written as the definition."""

from __future__ import annotations

import torch
import torch.nn.functional as F

FAR = 5e4  # the distance to what is no pixel of the object


def _normalise(distance, bias):
    return (torch.sigmoid(distance + bias) - 0.5) * 2


def _resize(maps, size):
    return F.interpolate(maps, size, mode="bilinear", align_corners=True)


def local_matching(
    prev_frame_embedding,
    query_embedding,
    prev_frame_labels,
    dis_bias=0.0,
    multi_local_distance=[15],
    ori_size=None,
    atrous_rate=1,
    use_float16=True,
    allow_downsample=True,
    allow_parallel=True,
):
    ori_size = ori_size or prev_frame_embedding.shape[:2]
    key, query, labels = (
        t.permute(2, 0, 1)[None] for t in (prev_frame_embedding, query_embedding, prev_frame_labels)
    )
    if use_float16:
        key, query = key.half(), query.half()
    if allow_downsample:
        half = [side // 2 + 1 for side in key.shape[2:]]
        key, query = _resize(key, half), _resize(query, half)
    labels = F.interpolate(labels, key.shape[2:], mode="nearest")
    height, width = key.shape[2:]
    maps = []
    for distance in [multi_local_distance[-1], *multi_local_distance[:-1]]:
        steps = distance // atrous_rate
        nearest = torch.full((labels.shape[1], height, width), FAR, dtype=key.dtype)
        for i in range(-steps, steps + 1):
            for j in range(-steps, steps + 1):
                y, x = i * atrous_rate, j * atrous_rate
                rows, columns = (
                    slice(max(0, -d), max(0, min(side, side - d))) for d, side in ((y, height), (x, width))
                )
                there = (slice(rows.start + y, rows.stop + y), slice(columns.start + x, columns.stop + x))
                if rows.start >= rows.stop or columns.start >= columns.stop:
                    continue
                d = (query[0, :, rows, columns] - key[0][:, there[0], there[1]]).square().sum(0)
                d = torch.where(labels[0][:, there[0], there[1]] > 0.9, d, FAR)
                around = (columns.start, width - columns.stop, rows.start, height - rows.stop)
                nearest = torch.minimum(nearest, F.pad(d, around, value=FAR))
        maps.append(nearest)
    maps = _normalise(torch.stack(maps, 1), dis_bias.view(-1, 1, 1, 1)).float()
    return _resize(maps, ori_size).permute(2, 3, 0, 1)[None]


def _global(embeddings, query, labels, bias, ori_size, rate, use_float16, least):
    if rate > 1:
        labels = [each.clone() for each in labels]
        for each in labels:
            kept = torch.zeros(each.shape[:2], dtype=torch.bool)
            kept[::rate, ::rate] = True
            for o in range(each.shape[2]):
                if each[..., o].sum() > least * rate**2:
                    each[..., o][~kept] = 0
    key = torch.cat([each.flatten(0, 1) for each in embeddings])
    labels = torch.cat([each.flatten(0, 1) for each in labels])
    known = labels.sum(1) > 0.9
    height, width, _ = query.shape
    if not known.any():
        return torch.ones(1, height, width, labels.shape[1], 1)
    key, labels, flat = key[known], labels[known], query.flatten(0, 1)
    if use_float16:
        key, flat = key.half(), flat.half()
    distance = (flat[:, None] - key[None]).square().sum(2)[:, None] + (labels.T < 0.1) * FAR
    out = _normalise(distance.amin(2).view(height, width, -1), bias.view(1, 1, -1)).float()
    if ori_size is not None:
        out = _resize(out.permute(2, 0, 1)[None], ori_size)[0].permute(1, 2, 0)
    return out[None, ..., None]


def global_matching(
    reference_embeddings,
    query_embeddings,
    reference_labels,
    n_chunks=100,
    dis_bias=0.0,
    ori_size=None,
    atrous_rate=1,
    use_float16=True,
    atrous_obj_pixel_num=0,
):
    lists = [reference_embeddings], query_embeddings, [reference_labels]
    return _global(*lists, dis_bias, ori_size, atrous_rate, use_float16, atrous_obj_pixel_num)


def global_matching_for_eval(
    all_reference_embeddings,
    query_embeddings,
    all_reference_labels,
    n_chunks=20,
    dis_bias=0.0,
    ori_size=None,
    atrous_rate=1,
    use_float16=True,
    atrous_obj_pixel_num=0,
):
    lists = all_reference_embeddings, query_embeddings, all_reference_labels
    return _global(*lists, dis_bias, ori_size, atrous_rate, use_float16, atrous_obj_pixel_num)
