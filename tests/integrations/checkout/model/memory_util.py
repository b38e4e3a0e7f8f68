"""The functions that XMem reads its memory by, written anew: same names, arguments and results."""

import math

import torch


def get_similarity(mk, ms, qk, qe):
    mk, qk = mk.flatten(2), qk.flatten(2)
    difference = mk.unsqueeze(3) - qk.unsqueeze(2)
    if qe is None:  # the original leaves out what does not depend on the memory
        scores = -(difference.square() - qk.unsqueeze(2).square()).sum(1)
    else:
        scores = -(qe.flatten(2).unsqueeze(2) * difference.square()).sum(1)
    if ms is not None:
        scores = scores * ms.flatten(1).unsqueeze(2)
    return scores / math.sqrt(mk.shape[1])


def do_softmax(similarity, top_k=None, inplace=False, return_usage=False):
    if top_k is None:
        affinity = similarity.softmax(1)
    else:
        values, places = similarity.topk(top_k, dim=1)
        affinity = torch.zeros_like(similarity).scatter_(1, places, values.softmax(1))
    return (affinity, affinity.sum(dim=2)) if return_usage else affinity


def get_affinity(mk, ms, qk, qe):
    return do_softmax(get_similarity(mk, ms, qk, qe))


def readout(affinity, mv):
    batch, channels, _, height, width = mv.shape
    return torch.bmm(mv.flatten(2), affinity).view(batch, channels, height, width)
