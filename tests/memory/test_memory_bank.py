"""MemoryBank keeps what its policy says, reads what a plain memory reads, and never passes its budget."""

from __future__ import annotations

import copy
import io
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.effort import examples
from vosops.memory import MemoryBank, MemoryBudgetError, MemorySettings, parse_bytes

CK, CV, H, W = 4, 6, 2, 3
PIXELS = H * W
LONG_TERM = {
    "policy": "long_term",
    "max_mid_term_frames": 4,
    "min_mid_term_frames": 2,
    "num_prototypes": 5,
    "max_long_term_elements": 14,
}
BOUNDS = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 4e-3, torch.int8: 3e-2}


def frame_of(objects, seed=0, value_channels=CV, size=(H, W)):
    """Random arguments of `add` for these objects."""
    random = torch.Generator().manual_seed(seed)

    def rand(*shape):
        return torch.randn(1, *shape, *size, generator=random)

    return {
        "key": rand(CK),
        "value": rand(len(objects), value_channels),
        "objects": list(objects),
        "shrinkage": 1 + rand(1).abs(),
        "selection": rand(CK).sigmoid(),
    }


def query_of(seed=0):
    random = torch.Generator().manual_seed(1000 + seed)
    return torch.randn(1, CK, 2, 2, generator=random), torch.rand(1, CK, 2, 2, generator=random)


def plain_read(entries, query, selection, top_k, o):
    """The read of one object in float64. entries: (key (Ck,m), shrinkage (m), {object: value (Cv,m)}) in order."""
    entries = [entry for entry in entries if o in entry[2]]
    key = torch.cat([entry[0] for entry in entries], 1).double()
    shrinkage = torch.cat([entry[1] for entry in entries]).double()
    value = torch.cat([entry[2][o] for entry in entries], 1).double()
    query, selection = query[0].flatten(1).double(), selection[0].flatten(1).double()
    distance = (selection[:, None] * (key[:, :, None] - query[:, None]).square()).sum(0)
    score = -distance * shrinkage[:, None] / CK**0.5
    if top_k is not None and top_k < len(score):
        least = score.topk(top_k, dim=0).values[-1]
        score = score.masked_fill(score < least, -torch.inf)
    return (value @ score.softmax(0)).view(-1, 2, 2)


class Plain:
    """Every frame that was ever added, in a dictionary, as they were given."""

    def __init__(self):
        self.frames = {}

    def add(self, frame, key, value, objects, shrinkage, selection):
        old = self.frames.get(frame, (None, None, {}))[2]
        values = {o: value[0, i].flatten(1) for i, o in enumerate(objects)}
        self.frames[frame] = (key[0].flatten(1), shrinkage.flatten(), {**old, **values})

    def remove(self, objects):
        for _, _, values in self.frames.values():
            for o in objects:
                values.pop(o, None)

    def read(self, kept, query, selection, top_k, o):
        return plain_read([self.frames[frame] for frame in kept], query, selection, top_k, o)


def assert_within_budget(bank):
    options = bank.settings
    assert bank.bytes_used <= bank.bytes_reserved
    assert bank.host_bytes_used <= bank.host_bytes_reserved
    host = parse_bytes(options.host_budget) if options.host_budget else 0
    assert bank.host_bytes_reserved <= host
    if options.budget is not None:
        budget = parse_bytes(options.budget)
        assert bank.bytes_reserved <= budget
        held = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors_of(bank)}
        assert sum(held.values()) <= budget + host, "nothing else is kept either"


def tensors_of(thing, seen=None):
    """Every tensor that can be reached from an object."""
    seen = set() if seen is None else seen
    if id(thing) in seen or isinstance(thing, (str, bytes, int, float, type(None), type)):
        return []
    seen.add(id(thing))
    if isinstance(thing, torch.Tensor):
        return [thing]
    if isinstance(thing, dict):
        parts = thing.values()
    elif isinstance(thing, (list, tuple, set)):
        parts = thing
    else:
        parts = getattr(thing, "__dict__", {}).values()
    return [tensor for part in parts for tensor in tensors_of(part, seen)]


def assert_same_state(one, other):
    assert one.keys() == other.keys()
    for name, value in one.items():
        if isinstance(value, dict):
            assert_same_state(value, other[name])
        elif isinstance(value, torch.Tensor):
            assert torch.equal(value, other[name]), name
        else:
            assert value == other[name], name


# ---- Any sequence of calls.

STEPS = st.lists(
    st.sampled_from(
        ["add"] * 6 + ["permanent", "temporary", "again", "new", "new two", "remove", "clear", "save"]
    ),
    min_size=1,
    max_size=16,
)


@settings(max_examples=examples(30), deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    steps=STEPS,
    policy=st.sampled_from(["every", "window"]),
    budget=st.sampled_from([None, 2500, 4000, 9000]),
    host_budget=st.sampled_from([None, 2500]),
    far_host=st.booleans(),
    dtype=st.sampled_from(list(BOUNDS)),
    top_k=st.sampled_from([None, 1, 4, 100]),
    max_mem_frames=st.integers(1, 4),
    choices=st.randoms(use_true_random=False),
)
def test_any_sequence_agrees_with_a_dictionary_of_frames(
    steps, policy, budget, host_budget, far_host, dtype, top_k, max_mem_frames, choices
):
    bank = MemoryBank(
        policy=policy,
        budget=budget,
        host_budget=host_budget,
        dtype=dtype,
        key_dtype=torch.float32,
        top_k=top_k,
        max_mem_frames=max_mem_frames,
    )
    bank._reader.far_host = far_host  # as with a GPU: what lies on the host is staged to be read
    plain, number, next_object, permanent, temporary, order = Plain(), 0, 1, set(), None, []
    for seed, step in enumerate(["new", *steps]):
        if step == "remove" and len(bank.objects) > 1:
            gone = choices.sample(bank.objects, choices.randint(1, len(bank.objects) - 1))
            bank.remove_objects(gone)
            plain.remove(gone)
            order = [f for f in order if plain.frames[f][2]]
            permanent &= set(order)
        elif step == "clear":
            bank.clear()
            order = [f for f in order if f in permanent]
            temporary = None
        elif step == "save":
            state = bank.state_dict()
            twin = MemoryBank(bank.settings)
            twin._reader.far_host = far_host
            twin.load_state_dict(state)
            assert_same_state(twin.state_dict(), state)
            bank = twin
        else:
            again = step == "again" and order
            frame = choices.choice(order) if again else number
            number += 1
            count = {"new": 1, "new two": 2}.get(step, 0)
            new = list(range(next_object, next_object + count))
            next_object += count
            data = frame_of([*bank.objects, *new], seed)
            before = bank.state_dict()
            try:
                stored = bank.add(frame, **data, permanent=step == "permanent", temporary=step == "temporary")
            except MemoryBudgetError as error:
                assert "fit" in str(error)
                assert_same_state(bank.state_dict(), before)
                if not bank.objects:
                    return
                continue
            if stored:
                plain.add(frame, **data)
                if temporary is not None and temporary != frame:
                    order.remove(temporary)
                temporary = frame if step == "temporary" else None
                order = order if frame in order else [*order, frame]
                permanent |= {frame} if new or step == "permanent" else set()
            else:
                assert budget is not None or (policy == "window" and max_mem_frames == 1)
        assert_within_budget(bank)

        kept = [slot.frame for slot in bank.frames]
        assert permanent <= set(kept) <= set(order), "permanent frames stay, evicted ones never return"
        others = [f for f in kept if f not in permanent and f != temporary]
        evictable = [f for f in order if f not in permanent and f != temporary]
        if dtype == torch.float32 and budget is None:
            limit = max_mem_frames - 1 if policy == "window" else len(evictable)
            assert others == evictable[len(evictable) - min(limit, len(evictable)) :], "the latest are kept"
        order = [f for f in order if f in kept]

        query, selection = query_of(seed)
        read = bank.read(query, selection)
        assert read.shape == (1, len(bank.objects), CV, 2, 2) and read.dtype == query.dtype
        for i, o in enumerate(bank.objects):
            expected = plain.read(kept, query, selection, top_k, o)
            torch.testing.assert_close(read[0, i].double(), expected, rtol=0, atol=BOUNDS[dtype])


def stored_entries(bank):
    """What a long-term bank holds, as `plain_read` takes it: prototypes one by one, then frames."""
    entries = []
    for rows in [bank._long_rows(), *(bank._work.rows(i) for i in range(len(bank._work.slots)))]:
        for p in range(len(rows)):
            values = {
                o: rows.column(f"value/{o}")[p][:, None].double()
                for group, members in bank._groups.items()
                if rows.column(f"mask/{group}")[p]
                for o in members
            }
            entries.append((rows.column("key")[p][:, None], rows.column("shrinkage")[p][None], values))
    return entries


@settings(max_examples=examples(12), deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    steps=STEPS,
    budget=st.sampled_from([None, 2500, 4000, 9000]),
    top_k=st.sampled_from([None, 4]),
    elements=st.integers(5, 20),
    choices=st.randoms(use_true_random=False),
)
def test_any_sequence_with_long_term_memory_stays_sound(steps, budget, top_k, elements, choices):
    options = {**LONG_TERM, "max_long_term_elements": elements, "budget": budget, "top_k": top_k}
    bank, plain, next_object, permanent = MemoryBank(**options), Plain(), 1, set()
    for seed, step in enumerate(["new", *steps, *["add"] * 6]):
        if step == "remove" and len(bank.objects) > 1:
            gone = choices.sample(bank.objects, 1)
            bank.remove_objects(gone)
            plain.remove(gone)
        elif step == "clear":
            bank.clear()
            assert bank.num_prototypes == 0
        elif step == "save":
            twin = MemoryBank(**options)
            twin.load_state_dict(bank.state_dict())
            assert torch.equal(twin.read(*query_of()), bank.read(*query_of()))
            assert_same_state(twin.state_dict(), bank.state_dict())
        else:
            new = list(range(next_object, next_object + {"new": 1, "new two": 2}.get(step, 0)))
            next_object += len(new)
            data = frame_of([*bank.objects, *new], seed)
            how = {"permanent": step == "permanent", "temporary": step == "temporary"}
            try:
                if bank.add(seed, **data, **how):
                    plain.add(seed, **data)
                    permanent |= {seed} if new or how["permanent"] else set()
            except MemoryBudgetError:
                if not bank.objects:
                    return
        assert_within_budget(bank)
        assert bank.num_prototypes <= elements
        frames = {slot.frame for slot in bank.frames}
        assert {f for f in permanent if plain.frames[f][2]} <= frames
        for i, slot in enumerate(bank._work.slots):  # each frame lies where the bank thinks it does
            key, _, values = plain.frames[slot.frame]
            assert torch.equal(bank._work.rows(i).column("key"), key.T)
            for group in slot.groups:
                for o in bank._groups[group]:
                    assert torch.equal(bank._work.rows(i).column(f"value/{o}"), values[o].T)
        query, selection = query_of(seed)
        read = bank.read(query, selection)
        if seed % 3 == 0:
            entries = stored_entries(bank)
            for i, o in enumerate(bank.objects):
                expected = plain_read(entries, query, selection, top_k, o)
                torch.testing.assert_close(read[0, i].double(), expected, rtol=0, atol=1e-4)


# ---- XMem's long-term memory.


class PlainXMem:
    """XMem's working and long-term memory by its rules, in plain tensors of positions, for any number of groups.

    A position: key, shrinkage, selection, usage, life, and for each group whether it sees it and its value.
    """

    def __init__(self, options):
        self.options = options
        self.work, self.long = [], []  # dictionaries of one position each
        self.first_of_group = set()
        self.groups = {}

    def add(self, frame, key, value, objects, shrinkage, selection):
        new = [o for o in objects if not any(o in group for group in self.groups.values())]
        if new:
            self.groups[len(self.groups)] = new
            self.first_of_group.add(frame)
        for p in range(PIXELS):
            values = {o: value[0, i].flatten(1)[:, p].double() for i, o in enumerate(objects)}
            self.work.append(
                {
                    "frame": frame,
                    "key": key[0].flatten(1)[:, p].double(),
                    "shrinkage": shrinkage.flatten()[p].double(),
                    "selection": selection[0].flatten(1)[:, p].double(),
                    "usage": 0.0,
                    "life": 1e-7,
                    "values": values,
                }
            )
        frames = sorted({p["frame"] for p in self.work} - self.first_of_group)
        if len(frames) >= self.options["max_mid_term_frames"] - 1:
            self.condense(set(frames[: len(frames) - (self.options["min_mid_term_frames"] - 1)]))

    def condense(self, frames):
        most, count = self.options["max_long_term_elements"], self.options["num_prototypes"]
        if len(self.long) >= most - count:
            self.evict(most - count)
        candidates = [p for p in self.work if p["frame"] in frames]
        self.work = [p for p in self.work if p["frame"] not in frames]
        ranked = sorted(range(len(candidates)), key=lambda i: -candidates[i]["usage"] / candidates[i]["life"])
        for prototype in (candidates[i] for i in ranked[:count]):
            shrinkage, _ = self.attend(candidates, prototype, None)
            values = {o: self.attend(candidates, prototype, o)[1] for o in prototype["values"]}
            self.long.append(
                {**prototype, "shrinkage": shrinkage, "values": values, "usage": 0.0, "life": 1e-7}
            )

    def attend(self, candidates, prototype, o):
        seen = [p for p in candidates if o is None or o in p["values"]]
        distance = torch.stack([p["key"] - prototype["key"] for p in seen]).square() @ prototype["selection"]
        shrinkage = torch.stack([p["shrinkage"] for p in seen])
        weights = (-distance * shrinkage / CK**0.5).softmax(0)
        value = None if o is None else sum(w * p["values"][o] for w, p in zip(weights, seen, strict=True))
        return (weights * shrinkage).sum(), value

    def evict(self, room):
        over = len(self.long) - room
        if over > 0:
            usage = [p["usage"] / p["life"] for p in self.long]
            least = sorted(usage)[over - 1]
            self.long = [p for p, u in zip(self.long, usage, strict=True) if u > least]

    def read(self, query, selection, top_k):
        outs = []
        query, selection = query[0].flatten(1).double(), selection[0].flatten(1).double()
        for group, objects in self.groups.items():
            seen = [p for p in self.long + self.work if objects[0] in p["values"]]
            key = torch.stack([p["key"] for p in seen])
            distance = (selection[None] * (key[:, :, None] - query[None]).square()).sum(1)
            score = -distance * torch.stack([p["shrinkage"] for p in seen])[:, None] / CK**0.5
            if top_k is not None:
                score = score.masked_fill(score < score.topk(top_k, dim=0).values[-1], -torch.inf)
            weights = score.softmax(0)
            for o in objects:
                outs.append(torch.stack([p["values"][o] for p in seen], 1) @ weights)
            if group == 0:
                for p, used in zip(seen, weights.sum(1).tolist(), strict=True):
                    p["usage"] += used
                    p["life"] += 1
        return torch.stack(outs)


@pytest.mark.parametrize("top_k", [None, 3])
@pytest.mark.parametrize("policy", ["window", "long_term"])
def test_groups_read_in_one_pass_over_the_scores(policy, top_k, monkeypatch):
    """Where each sees all frames or all since it came; and the same as each by itself."""
    from vosops.memory import reader

    options = {**LONG_TERM, "max_mid_term_frames": 9} if policy == "long_term" else {"policy": "window"}
    bank = MemoryBank(top_k=top_k, **options)
    for t in range(7):
        bank.add(t, **frame_of([1] + [2, 3] * (t >= 2) + [4] * (t >= 3), t))
    assert bank.groups == [[1], [2, 3], [4]]
    apart = torch.cat([bank.read(*query_of(), objects=[o]) for o in bank.objects], 1)
    passes = []
    for name in ("memory_read", "memory_select"):
        real = getattr(reader, name)
        monkeypatch.setattr(
            reader,
            name,
            lambda *a, real=real, **k: passes.append(k.get("groups")) or real(*a, **k),
        )
    together = bank.read(*query_of())
    torch.testing.assert_close(together, apart, atol=1e-5, rtol=0)
    assert len(passes[0]) == 3
    usage = policy == "long_term" and top_k is None
    assert len(passes) == 1 + usage, "one pass, and one for the usage of the full softmax"


@pytest.mark.parametrize("top_k", [None, 6])
@pytest.mark.parametrize("groups", [1, 3])
def test_long_term_memory_follows_the_rules_of_xmem(groups, top_k):
    bank = MemoryBank(top_k=top_k, budget="40kB", **LONG_TERM)
    plain = PlainXMem(LONG_TERM)
    sizes = []
    for t in range(24):
        objects = [1, 2] + ([5] if groups > 1 and t >= 5 else []) + ([3, 7] if groups > 1 and t >= 9 else [])
        data = frame_of(objects, t)
        assert bank.add(t, **data)
        plain.add(t, **data)
        for again in range(2):
            query, selection = query_of(10 * t + again)
            expected = plain.read(query, selection, top_k).view(1, len(objects), CV, 2, 2)
            torch.testing.assert_close(
                bank.read(query, selection).double(), expected, rtol=0, atol=1e-4, msg=f"at frame {t}"
            )
        assert bank.num_prototypes == len(plain.long)
        assert {s.frame for s in bank.frames} == {p["frame"] for p in plain.work}
        assert_within_budget(bank)
        sizes.append(bank.num_prototypes)
    assert max(sizes) <= LONG_TERM["max_long_term_elements"]
    assert any(after <= before for before, after in zip(sizes[10:], sizes[11:], strict=False)), (
        "some were evicted"
    )
    assert len(bank.groups) == groups


def test_usage_is_the_weight_in_reads_over_the_reads_since_a_position_came():
    bank = MemoryBank(top_k=2, **LONG_TERM)
    data = frame_of([1], 0)
    bank.add(0, **data)
    for _ in range(3):
        bank.read(data["key"], data["selection"])  # each pixel finds itself first
    usage = bank._work.all().column("usage")
    assert usage.sum() == pytest.approx(3 * PIXELS)
    assert bank._work.all().column("life").tolist() == pytest.approx([3.0] * PIXELS)


@pytest.mark.parametrize(("ties", "left"), [(True, 0), (False, 4)])
def test_eviction_takes_ties_along_like_xmem_or_not_like_cutie(ties, left):
    options = {**LONG_TERM, "max_long_term_elements": 9, "evict_ties": ties}
    bank = MemoryBank(top_k=2, **options)
    for t in range(6):  # never read: every usage is 0
        bank.add(t, **frame_of([1], t))
    assert bank.num_prototypes == left + LONG_TERM["num_prototypes"]


def test_buffer_tokens_are_evicted_beyond_what_is_needed():
    counts = {}
    for buffer in (0, 3):
        bank = MemoryBank(top_k=2, **{**LONG_TERM, "buffer_tokens": buffer, "evict_ties": False})
        for t in range(8):
            bank.add(t, **frame_of([1], t))
        counts[buffer] = bank.num_prototypes
    assert counts[0] == LONG_TERM["max_long_term_elements"]
    assert counts[3] == counts[0] - 3


def test_without_counted_usage_the_oldest_prototypes_go():
    bank = MemoryBank(top_k=2, **{**LONG_TERM, "enable_long_term_count_usage": False})
    condensed = 0
    for t in range(16):
        before = bank._long_rows().column("key").clone() if t else torch.empty(0, CK)
        bank.add(t, **frame_of([1], t))
        bank.read(*query_of(t))
        after = bank._long_rows().column("key")
        if len(before) == 14 and not torch.equal(before, after):
            assert torch.equal(after[:9], before[-9:])
            condensed += 1
    assert condensed >= 2


def test_condensing_needs_no_more_pixels_than_there_are():
    bank = MemoryBank(top_k=30, **{**LONG_TERM, "num_prototypes": 500, "max_long_term_elements": 1000})
    for t in range(8):
        bank.add(t, **frame_of([1], t))
    assert bank.num_prototypes == 3 * 2 * PIXELS  # three times two frames
    bank.read(*query_of())


def test_a_budget_too_small_for_the_long_term_memory_gives_up_prototypes_then_frames():
    kept = {}
    for budget in ("30kB", "3200", "2300", "1500"):
        bank = MemoryBank(top_k=2, budget=budget, **LONG_TERM)
        for t in range(20):
            bank.add(t, **frame_of([1, 2], t))
            bank.read(*query_of(t))
            assert_within_budget(bank)
        kept[budget] = (bank.num_prototypes, len(bank.frames))
        assert bank.frames[0].frame == 0
    assert kept["30kB"][0] == 14 and 5 <= kept["3200"][0] < 14
    assert kept["2300"][1] <= kept["3200"][1] and kept["1500"][0] == 0


# ---- Which frames are kept.


def test_the_error_says_how_many_permanent_frames_fit():
    bank = MemoryBank(budget=2500)
    with pytest.raises(
        MemoryBudgetError, match=r"budget must be at least \d+ bytes .* got 2500: (\d+) fit"
    ) as error:
        for t in range(100):
            bank.add(t, **frame_of([1], t), permanent=True)
            stored = t + 1
    assert str(error.value).endswith(f"{stored} fit")
    assert [slot.frame for slot in bank.frames] == list(range(stored))
    needed = int(str(error.value).split("at least ")[1].split()[0])
    enough = MemoryBank(budget=needed)
    for t in range(stored + 1):
        enough.add(t, **frame_of([1], t), permanent=True)
    with pytest.raises(MemoryBudgetError):
        enough.add(100, **frame_of([1], 0), permanent=True)


def test_a_frame_is_not_stored_where_permanent_ones_leave_no_room():
    bank = MemoryBank(budget=2500)
    fitting = 0
    while True:
        try:
            bank.add(fitting, **frame_of([1], fitting), permanent=True)
        except MemoryBudgetError:
            break
        fitting += 1
    assert not bank.add(100, **frame_of([1]))
    assert len(bank.frames) == fitting and not bank.due(101)


def test_a_new_object_makes_room_and_removing_one_gives_it_back():
    bank = MemoryBank(budget=4000)
    for t in range(50):
        bank.add(t, **frame_of([1], t))
    few = len(bank.frames)
    bank.add(50, **frame_of([1, 2, 3, 4], 50))
    assert len(bank.frames) < few and bank.groups == [[1], [2, 3, 4]]
    bank.remove_objects([2, 4])
    assert bank.objects == [1, 3]
    bank.remove_objects([3])
    for t in range(51, 100):
        bank.add(t, **frame_of([1], t))
        assert_within_budget(bank)
    assert len(bank.frames) == few
    assert [s.frame for s in bank.frames if s.permanent] == [0, 50]


def test_removing_the_last_object_empties_the_bank():
    bank = MemoryBank(budget=4000)
    bank.add(0, **frame_of([1]))
    bank.remove_objects([1])
    assert bank.objects == [] and bank.frames == [] and bank.bytes_reserved == bank.bytes_used == 0
    with pytest.raises(RuntimeError, match="empty"):
        bank.read(*query_of())
    bank.add(0, **frame_of([9], size=(3, 4)))  # of another size
    assert bank.objects == [9]


def test_removing_a_group_drops_the_prototypes_that_only_it_saw():
    bank = MemoryBank(top_k=2, **{**LONG_TERM, "max_long_term_elements": 100})
    for t in range(16):
        bank.add(t, **frame_of([1] if t < 8 else [1, 2], t))
        bank.read(*query_of(t))
    seen = bank._seen[1]
    assert 0 < seen < bank.num_prototypes
    bank.remove_objects([1])
    assert bank.num_prototypes == seen
    assert min(slot.frame for slot in bank.frames) == 8
    assert bank.read(*query_of()).isfinite().all()


@pytest.mark.parametrize("policy", ["every", "window", "long_term"])
def test_clear_keeps_what_is_permanent(policy):
    bank = MemoryBank(top_k=2, **{**LONG_TERM, "policy": policy})
    for t in range(9):
        bank.add(t, **frame_of([1] if t < 5 else [1, 2], t), permanent=t == 7)
    bank.clear()
    assert [slot.frame for slot in bank.frames] == [0, 5, 7]
    assert bank.num_prototypes == 0 and bank.due(8)
    bank.clear(keep_permanent=False)
    assert bank.objects == [] and bank.bytes_reserved == 0


def test_a_cleared_long_term_memory_resumes_to_the_bit():
    bank = MemoryBank(top_k=3, **LONG_TERM)
    for t in range(12):
        bank.add(t, **frame_of([1, 2] if t < 4 else [1, 2, 3], t))
        bank.read(*query_of(t))
    assert bank.num_prototypes > 0
    bank.clear()
    resumed = MemoryBank(bank.settings)
    resumed.load_state_dict(bank.state_dict())
    assert bank._views(list(bank._groups)) == [
        view._replace(parts=[replace(rows, arena=bank._arena) for rows in view.parts])
        for view in resumed._views(list(resumed._groups))
    ]
    for t in range(3):
        assert torch.equal(bank.read(*query_of(t)), resumed.read(*query_of(t)))


def test_a_temporary_frame_is_dropped_by_the_next():
    bank = MemoryBank(policy="window", max_mem_frames=3)
    for t in range(8):
        bank.add(t, **frame_of([1], t), temporary=t % 2 == 1)
    assert [slot.frame for slot in bank.frames] == [0, 4, 6, 7]  # first, two of the window, the temporary one


def test_due_counts_from_the_last_frame_that_was_added_in_either_direction():
    bank = MemoryBank(mem_every=5)
    assert bank.due(20)
    bank.add(20, **frame_of([1]))
    assert [t for t in range(12, 30) if bank.due(t)] == [12, 13, 14, 15, 25, 26, 27, 28, 29]
    bank.add(24, **frame_of([1]), temporary=True)
    assert bank.due(25)


def test_storage_is_allocated_once():
    bank = MemoryBank(top_k=4, budget="40kB", **LONG_TERM)
    places = set()
    for t in range(30):
        bank.add(t, **frame_of([1, 2] if t < 10 else [1, 2, 3], t))
        bank.read(*query_of(t))
        places.add(bank._arena.view("work", "key").untyped_storage().data_ptr())
    assert len(places) == 1
    assert bank.bytes_reserved == 40000


def test_bytes_used_counts_every_stored_number():
    bank = MemoryBank(dtype=torch.int8, key_dtype=torch.float16)
    for t in range(3):
        bank.add(t, **frame_of([1, 2], t))
    position = CK * 2 + 4 + 1 + 2 * (CV + 4)  # key, shrinkage, mask; values and their scales
    assert bank.bytes_used == 3 * PIXELS * position
    bank = MemoryBank(**LONG_TERM)
    for t in range(4):
        bank.add(t, **frame_of([1], t))
    prototype = 4 * (CK + 1 + 2 + CV) + 1  # key, shrinkage, usage and life, value; mask
    assert bank.bytes_used == 2 * PIXELS * (prototype + 4 * CK) + 5 * prototype  # frames keep their selection


# ---- What is read.


@pytest.mark.parametrize("top_k", [None, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.int8])
def test_frames_on_the_host_are_read_as_if_they_were_not(dtype, top_k):
    whole = MemoryBank(dtype=dtype, top_k=top_k)
    parted = MemoryBank(
        dtype=dtype, top_k=top_k, budget=4000 if dtype == torch.float32 else 2500, host_budget="1MB"
    )
    staged = copy.deepcopy(parted)
    staged._reader.far_host = True
    for t in range(12):
        data = frame_of([1, 2], t)
        for bank in (whole, parted, staged):
            assert bank.add(t, **data)
    assert parted.host_bytes_used > 0 and staged.host_bytes_used > 0
    assert [s.frame for s in parted.frames] == [s.frame for s in whole.frames]
    expected = whole.read(*query_of())
    for bank in (parted, staged):
        torch.testing.assert_close(bank.read(*query_of()), expected, rtol=0, atol=1e-5)


def test_reads_of_some_objects_are_those_of_all():
    bank = MemoryBank(top_k=3)
    for t in range(6):
        bank.add(t, **frame_of([4, 2] if t < 3 else [4, 2, 9], t))
    every = bank.read(*query_of())
    assert bank.objects == [4, 2, 9]
    assert torch.equal(bank.read(*query_of(), objects=[9, 4]), every[:, [2, 0]])


@pytest.mark.parametrize("similarity", ["dot", "l2"])
def test_shrinkage_and_selection_are_optional(similarity):
    bank = MemoryBank(similarity=similarity)
    data = frame_of([1])
    del data["shrinkage"], data["selection"]
    bank.add(0, **data)
    query, _ = query_of()
    key, value = data["key"][0].flatten(1), data["value"][0, 0].flatten(1)
    score = key.T @ query[0].flatten(1)
    score = score if similarity == "dot" else 2 * score - key.square().sum(0)[:, None]
    expected = value @ (score / CK**0.5).softmax(0)
    torch.testing.assert_close(bank.read(query)[0, 0].flatten(1), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.int8, 0.5 / 127), (torch.bfloat16, 2**-8), (torch.float16, 2**-11)]
)
def test_stored_values_are_rounded_by_no_more_than_their_dtype_says(dtype, bound):
    bank = MemoryBank(dtype=dtype, key_dtype=torch.float32)
    data = frame_of([1], size=(8, 8))
    data["value"][..., 0, 0] = 0  # a position of zeros
    bank.add(0, **data)
    stored = bank._work.all().column("value/1").float()
    if dtype == torch.int8:
        stored = stored * bank._work.all().column("scale/1")[:, None]
    given = data["value"][0, 0].flatten(1).T
    assert ((stored - given).abs() <= bound * 1.001 * given.abs().amax(1, keepdim=True)).all()


# ---- Saving and errors.


@pytest.mark.parametrize("policy", ["every", "window", "long_term"])
def test_a_resumed_bank_goes_on_to_the_bit(policy):
    options = {**LONG_TERM, "policy": policy, "top_k": 4, "budget": "9kB"}
    options |= {} if policy == "long_term" else {"host_budget": "3kB"}
    straight = MemoryBank(**options)

    def go(bank, frames):
        reads = []
        for t in frames:
            objects = [1, 2] if t < 6 else [1, 2, 3]
            bank.add(t, **frame_of(objects, t), permanent=t == 9)
            reads.append(bank.read(*query_of(t)))
        return reads

    expected = go(straight, range(24))
    first = MemoryBank(**options)
    go(first, range(13))
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second = MemoryBank(**options)
    second.add(0, **frame_of([8], size=(4, 4)))  # is forgotten
    second.load_state_dict(torch.load(file, weights_only=True))
    for got, want in zip(go(second, range(13, 24)), expected[13:], strict=True):
        assert torch.equal(got, want)
    assert_same_state(second.state_dict(), straight.state_dict())
    copied = copy.deepcopy(second)
    assert torch.equal(copied.read(*query_of()), second.read(*query_of()))


def test_a_state_must_suit_the_bank():
    bank = MemoryBank()
    for t in range(20):
        bank.add(t, **frame_of([1], t))
    state = bank.state_dict()
    with pytest.raises(ValueError, match="policy"):
        MemoryBank(policy="window").load_state_dict(state)
    with pytest.raises(MemoryBudgetError, match="20 frames"):
        MemoryBank(budget=4000).load_state_dict(state)
    bank.load_state_dict(MemoryBank().state_dict())
    assert bank.objects == []


def test_banks_made_in_inference_mode_work_outside_of_it():
    with torch.inference_mode():
        bank = MemoryBank(top_k=2, **LONG_TERM)
        for t in range(5):
            bank.add(t, **frame_of([1], t))
            bank.read(*query_of(t))
    bank.add(5, **frame_of([1], 5))
    assert bank.read(*query_of()).isfinite().all()


def test_settings_of_xmem_and_cutie_by_their_names():
    xmem = MemorySettings.xmem(
        {"max_mid_term_frames": 7, "min_mid_term_frames": 4, "num_prototypes": 64, "size": 480}
    )
    assert (xmem.policy, xmem.max_mid_term_frames, xmem.min_mid_term_frames) == ("long_term", 7, 4)
    assert (xmem.num_prototypes, xmem.max_long_term_elements, xmem.top_k, xmem.mem_every) == (
        64,
        10000,
        30,
        5,
    )
    assert MemorySettings.xmem({"enable_long_term": False}).policy == "every"
    config = {
        "mem_every": 10,
        "max_mem_frames": 4,
        "top_k": 20,
        "long_term": {"max_num_tokens": 5000, "max_mem_frames": 8},
    }
    window = MemorySettings.cutie(config)
    assert (window.policy, window.max_mem_frames, window.mem_every, window.top_k) == ("window", 4, 10, 20)
    cutie = MemorySettings.cutie({**config, "use_long_term": True}, budget="2GB")
    assert (cutie.policy, cutie.max_mid_term_frames, cutie.max_long_term_elements) == ("long_term", 8, 5000)
    assert (cutie.buffer_tokens, cutie.evict_ties, cutie.budget) == (2000, False, "2GB")


@pytest.mark.parametrize(
    ("text", "count"),
    [("2GB", 2 * 10**9), ("1.5 MiB", 3 << 19), ("700", 700), (8, 8), ("3k", 3000), ("1gib", 1 << 30)],
)
def test_sizes_are_read(text, count):
    assert parse_bytes(text) == count


@pytest.mark.parametrize("text", ["", "GB", "-3", "2 apples", "0", 0, -1, None, True, 2.5])
def test_other_sizes_are_refused(text):
    with pytest.raises(ValueError, match="size"):
        parse_bytes(text)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"policy": "fifo"}, "policy"),
        ({"similarity": "cosine"}, "similarity"),
        ({"mem_every": 0}, "mem_every"),
        ({"min_mid_term_frames": 10}, "min_mid_term_frames"),
        ({"num_prototypes": 20000}, "num_prototypes"),
        ({"budget": "much"}, "size"),
        ({"policy": "long_term", "host_budget": 10}, "host_budget"),
        ({"dtype": torch.float64}, "dtype"),
        ({"key_dtype": torch.int8}, "key_dtype"),
        ({"top_k": 0}, "top_k"),
    ],
)
def test_wrong_settings_name_the_setting(options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        MemoryBank(**options)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"objects": [1, 2, 3]}, "value"),
        ({"objects": [1, 1]}, r"objects must be different ids, at least one, got \[1, 1\]"),
        ({"objects": []}, r"objects must be different ids, at least one, got \[\]"),
        (
            {name: tensor[..., :0] for name, tensor in frame_of([1, 2]).items() if name != "objects"},
            "key and value must not be empty",
        ),
        ({"key": torch.zeros(2, CK, H, W)}, "key"),
        ({"key": torch.zeros(1, CK, H, W, dtype=torch.int32)}, "key"),
        ({"shrinkage": torch.zeros(1, 1, H)}, "shrinkage"),
        ({"selection": torch.zeros(1, CK + 1, H, W)}, "selection"),
        ({"shrinkage": None}, "shrinkage"),
        ({"value": torch.zeros(1, 2, CV + 1, H, W)}, "value_channels"),
        ({"permanent": True, "temporary": True}, "temporary"),
        ({"objects": [1, 3]}, "group"),
    ],
)
def test_wrong_arguments_are_named_and_change_nothing(change, message):
    bank = MemoryBank()
    bank.add(0, **frame_of([1, 2]))
    before = bank.state_dict()
    with pytest.raises((ValueError, TypeError), match=message):
        bank.add(1, **{**frame_of([1, 2]), **change})
    assert_same_state(bank.state_dict(), before)


@pytest.mark.parametrize("objects", [[], [3, 3], [2, 3]])
def test_only_new_objects_are_declared(objects):
    bank = MemoryBank()
    bank.add(0, **frame_of([1, 2]))
    with pytest.raises(ValueError, match="objects must be different new ids, at least one, got"):
        bank.declare_objects(objects)
    assert bank.objects == [1, 2]


def test_only_stored_frames_are_removed():
    bank = MemoryBank()
    bank.add(4, **frame_of([1, 2]))
    with pytest.raises(ValueError, match=r"frames must be stored ones, \[4\], got \[4, 5\]"):
        bank.remove_frames([4, 5])
    assert [frame.frame for frame in bank.frames] == [4]


def test_unknown_objects_are_refused():
    bank = MemoryBank()
    bank.add(0, **frame_of([1, 2]))
    with pytest.raises(ValueError, match="objects"):
        bank.remove_objects([3])
    with pytest.raises(ValueError, match="objects"):
        bank.read(*query_of(), objects=[3])
    with pytest.raises(TypeError, match="both"):
        MemoryBank(MemorySettings(), top_k=3)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_bank_on_a_gpu_off_loads_to_pinned_memory():
    whole, parted = MemoryBank(top_k=5), MemoryBank(top_k=5, budget=9000, host_budget="1MB", device="cuda")
    for t in range(12):
        data = frame_of([1, 2], t)
        whole.add(t, **data)
        parted.add(t, **{name: x.cuda() if isinstance(x, torch.Tensor) else x for name, x in data.items()})
    assert parted.host_bytes_used > 0
    query, selection = query_of()
    got = parted.read(query.cuda(), selection.cuda()).cpu()
    torch.testing.assert_close(got, whole.read(query, selection), rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.int8])
@pytest.mark.parametrize("top_k", [None, 3])
@pytest.mark.parametrize("staged", [False, True])
def test_a_query_pixel_that_is_nan_reads_nan_and_no_other(dtype, top_k, staged):
    host = {"budget": 4000 if dtype == torch.float32 else 2500, "host_budget": "1MB"} if staged else {}
    bank = MemoryBank(dtype=dtype, top_k=top_k, **host)
    bank._reader.far_host = staged  # what lies on the host is staged to be read
    for t in range(12):
        bank.add(t, **frame_of([1, 2], t))
    assert (bank.host_bytes_used > 0) == staged
    query, selection = query_of()
    before = bank.read(query, selection)
    query[0, 2, 1, 0] = torch.nan
    read = bank.read(query, selection)
    assert read[..., 1, 0].isnan().all()
    other = torch.ones(2, 2, dtype=torch.bool)
    other[1, 0] = False
    torch.testing.assert_close(read[..., other], before[..., other])


# ---- Frames with a NaN in them: such a position is never chosen, and spoils no other.


def spoiled(frame, places, *names):
    """The frame with a NaN in one channel of each of these at these places."""
    frame = dict(frame)
    for name in names:
        frame[name] = frame[name].clone()
        frame[name][..., 0, places[0], places[1]] = torch.nan
    return frame


@pytest.mark.parametrize("dtype", [torch.float32, torch.int8])
@pytest.mark.parametrize("name", ["key", "shrinkage"])
def test_a_position_that_is_nan_is_not_chosen(dtype, name):
    """Reads, and prototypes when frames are condensed, are those of the same frames without it."""
    place = ([0], [1])
    options = {"dtype": dtype, "top_k": 3, **LONG_TERM}
    bank, clean = MemoryBank(**options), MemoryBank(**options)
    query, selection = query_of()
    for t in range(9):
        frame = frame_of([1, 2], t)
        bank.add(t, **spoiled(frame, place, name, "value"))
        far = {**frame, "key": frame["key"].clone()}
        far["key"][..., 0, 1] = 1e3  # nothing chooses this position either
        clean.add(t, **far)
        read = bank.read(query, selection)
        assert read.isfinite().all()
        if t < 2:
            torch.testing.assert_close(read, clean.read(query, selection))
    prototypes = bank._long_rows()
    assert len(prototypes) and prototypes.column(name).isfinite().all()
    for o in (1, 2):
        column = "scale" if dtype == torch.int8 else "value"
        assert prototypes.column(f"{column}/{o}").isfinite().all()


def test_a_query_pixel_that_is_nan_leaves_the_order_of_eviction():
    """Usage stays a number in both kinds of read, and rows that are NaN go first."""
    query, selection = query_of()
    query[0, 1, 0, 0] = torch.nan
    for top_k in (None, 3):
        bank = MemoryBank(top_k=top_k, **LONG_TERM)
        for t in range(9):
            bank.add(t, **frame_of([1], t))
            bank.read(query, selection)
        rows = bank._long_rows()
        assert len(rows) and rows.column("usage").isfinite().all()
        rows.column("key")[0] = torch.nan
        rows.column("usage")[:] = torch.arange(len(rows), 0, -1)  # the first would be the last to go
        left = len(rows) - 1
        bank._evict(left)
        assert len(bank._long_rows()) == left and bank._long_rows().column("key").isfinite().all()


def test_an_int8_row_with_a_nan_is_nan_as_a_whole_and_no_other():
    frame = frame_of([1])
    frame["value"][0, 0, 2, 0, 1], frame["value"][0, 0, 0, 1, 0] = torch.nan, torch.inf
    bank = MemoryBank(dtype=torch.int8, top_k=1)
    bank.add(0, **frame)
    values = bank.read(frame["key"], frame["selection"])[0, 0]
    bad = values.isnan()
    assert bad[:, 0, 1].all() and bad[:, 1, 0].all() and bad.sum() == 2 * len(values)
