"""Ranks die at random moments, new processes take their places, and every result of every survivor is right."""

import os
import random
import signal
import threading

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


def _run(rank, group, iterations, deaths, seed, hops):
    """Processes 0…7 are the first ranks; process 8 + i takes the place of the i-th that dies."""
    store = group.store
    schedule = _schedule(iterations, deaths, seed)
    newcomer = rank >= NUM_RANKS
    if newcomer:
        place = schedule[rank - NUM_RANKS][1]
        store.wait([f"dead/{rank - NUM_RANKS}"])
    else:
        place = rank
    job = moe_comm.EPGroup.from_store(store, place, NUM_RANKS, name="job", timeout_s=60)
    options = {**OPTIONS, "num_experts": 16, "hops": hops, "ranks_per_node": RANKS_PER_NODE}
    buffer = moe_comm.Buffer(job, rejoin=newcomer, timeout_s=60, **options)
    died = rank - NUM_RANKS + 1 if newcomer else 0  # deaths until now
    iteration = _agree(store, buffer.generation, place, 0)
    nodes = [r // RANKS_PER_NODE for r in range(NUM_RANKS)]
    checked = 0
    while iteration < iterations:
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
    _agree(store, "end", place, 0)
    buffer.close()
    return checked, buffer.generation


@pytest.mark.plain("the same recoveries run over it in test_generations.py")
@pytest.mark.timeout(170)
@pytest.mark.parametrize("hops", ["node", "rank"])
def test_soak(run_ranks, hops):
    _soak(run_ranks, hops, iterations=500, deaths=3, seed=1)


@pytest.mark.slow
@pytest.mark.plain("the same recoveries run over it in test_generations.py")
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("hops", ["node", "rank"])
def test_long_soak(run_ranks, hops):
    _soak(run_ranks, hops, iterations=20_000, deaths=40, seed=2)


def _soak(run_ranks, hops, iterations, deaths, seed):
    died = {}  # by process: the last holder of a place dies
    holder = list(range(NUM_RANKS))
    for i, (_, victim, _) in enumerate(_schedule(iterations, deaths, seed)):
        died[holder[victim]] = i
        holder[victim] = NUM_RANKS + i
    results = run_ranks(
        _run, NUM_RANKS + deaths, iterations, deaths, seed, hops, timeout_s=1100, may_die=list(died)
    )
    for process in range(NUM_RANKS + deaths):
        if process not in died:
            checked, generation = results[process]
            assert generation == deaths
            if process < NUM_RANKS:
                assert checked >= iterations - 2 * deaths
