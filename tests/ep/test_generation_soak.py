"""Ranks die at random moments, new processes take their places, and every result of every survivor is right."""

import os
import random
import signal
import threading
import time

import pytest
from test_generations import OPTIONS, _check

import moe_comm
from moe_comm import PeerLost, PeerTimeout

NUM_RANKS = 8
RANKS_PER_NODE = 2


def _schedule(iterations, deaths, seed):
    """[(iteration, victim, seconds after its beginning)] of each death; the same on all ranks."""
    r = random.Random(seed)
    at = sorted(r.sample(range(5, iterations - 20), deaths))
    return [(iteration, r.randrange(NUM_RANKS), r.random() * 0.004) for iteration in at]


def _agree(store, generation, rank, iteration):
    """Where to go on: the furthest that any rank of this generation came. A newcomer came to 0."""
    keys = [f"{generation}/at/{r}" for r in range(NUM_RANKS)]
    store.set(keys[rank], str(iteration))
    store.wait(keys)
    return max(int(store.get(key)) for key in keys)


def _is_over(store, schedule, iteration, deadline):
    """One answer for all who ask at this iteration: whoever asks first looks at the clock."""
    if iteration % 50 or any(iteration - 5 < at <= iteration for at, _, _ in schedule):
        return False
    store.compare_set(f"over/{iteration}", "", "yes" if time.monotonic() > deadline else "no")
    return store.get(f"over/{iteration}") == b"yes"


def _run(rank, group, iterations, deaths, seed, hops, seconds):
    """Processes 0…7 are the first ranks; process 8 + i takes the place of the i-th that dies.

    Returns how many results were checked, and the generation; None of a process that was not needed.
    """
    store = group.store
    schedule = _schedule(iterations, deaths, seed)
    store.compare_set("deadline", "", str(time.monotonic() + seconds))
    deadline = float(store.get("deadline"))
    newcomer = rank >= NUM_RANKS
    if newcomer:
        place = schedule[rank - NUM_RANKS][1]
        while not store.check([f"dead/{rank - NUM_RANKS}"]):
            if store.check(["end"]):
                return None
            time.sleep(0.2)
    else:
        place = rank
    job = moe_comm.EPGroup.from_store(store, place, NUM_RANKS, name="job", timeout_s=60)
    options = {**OPTIONS, "num_experts": 16, "hops": hops, "ranks_per_node": RANKS_PER_NODE}
    buffer = moe_comm.Buffer(job, rejoin=newcomer, timeout_s=60, **options)
    died = rank - NUM_RANKS + 1 if newcomer else 0  # deaths until now
    iteration = _agree(store, buffer.generation, place, 0)
    nodes = [r // RANKS_PER_NODE for r in range(NUM_RANKS)]
    checked = 0
    while iteration < iterations and not _is_over(store, schedule, iteration, deadline):
        if died < deaths and iteration >= schedule[died][0] and schedule[died][1] == place:
            store.set(f"dead/{died}", "1")
            threading.Timer(schedule[died][2], os.kill, (os.getpid(), signal.SIGKILL)).start()
        try:
            _check(buffer, place, (), seed=iteration, hops=hops, node_of=nodes, num_ranks=NUM_RANKS)
            checked += 1
            iteration += 1
        except (PeerLost, PeerTimeout):
            buffer.recover(expect=[schedule[died][1]], timeout_s=60)
            assert all(buffer.alive())
            died += 1
            iteration = _agree(store, buffer.generation, place, iteration)
    _agree(store, "last", place, iteration)
    store.set("end", "1")
    buffer.close()
    return checked, buffer.generation, iteration


@pytest.mark.plain("the same recoveries run over it in test_generations.py")
@pytest.mark.timeout(170)
@pytest.mark.parametrize("hops", ["node", "rank"])
def test_soak(run_ranks, hops):
    checked, generation, iteration = _soak(run_ranks, hops, iterations=500, deaths=3, seed=1)
    assert (generation, iteration) == (3, 500)
    assert checked >= iteration - 2 * generation  # of one that was there from the beginning


@pytest.mark.slow
@pytest.mark.plain("the same recoveries run over it in test_generations.py")
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("hops", ["node", "rank"])
def test_long_soak(run_ranks, hops):
    """20 000 iterations, or as many as are done in 10 minutes."""
    checked, generation, iteration = _soak(
        run_ranks, hops, iterations=20_000, deaths=40, seed=2, seconds=600
    )
    print(f"{iteration} iterations, {generation} deaths")
    assert generation > 2 and checked > 500


def _soak(run_ranks, hops, iterations, deaths, seed, seconds=1e9):
    """What a process that did not die returns that checked most."""
    victims = list(_victims(_schedule(iterations, deaths, seed)))
    results = run_ranks(
        _run, NUM_RANKS + deaths, iterations, deaths, seed, hops, seconds,
        timeout_s=min(seconds + 400, 1100), may_die=victims,
    )  # fmt: skip
    left = [r for r in results if r is not None]
    assert len(left) == NUM_RANKS and len({r[1:] for r in left}) == 1, results
    return max(left)


def _victims(schedule):
    """The process of each death: the last holder of the place."""
    holder = list(range(NUM_RANKS))
    for i, (_, place, _) in enumerate(schedule):
        yield holder[place]
        holder[place] = NUM_RANKS + i
