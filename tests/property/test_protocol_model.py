"""The protocol's rules hold in the model, and none can be left out.

Each baseline runs every scenario over hundreds of seeded schedules, worlds and both hops, with
epochs that cross the six bits of an immediate. Then each rule is broken alone, and within the seeds
used the model must notice; with the rule back in place the same seed passes.

| Rule | Broken by | Seen as |
|---|---|---|
| One sequence of epochs for dispatch and combine | separate_sequences | corrupt, wrong, mismatch |
| Another kind in the expected epoch is an error | kind_not_checked | wrong |
| Counters are wide; six bits are widened first | narrow_epochs | deadlock |
| Nobody resets a flag that others set or read | flags_reset_by_reader | deadlock |
| Epoch e is written after the reader's release of e − 2 | no_credit_check | corrupt |
| … by the forwarder too | forwarder_without_credit | corrupt |
| A release is per bank | single_release_counter | corrupt |
| A release carries its epoch | boolean_release_flag | deadlock |
| A release never waits for a message to ride on | piggybacked_release | deadlock |
| Released means all reads are done: forward … | release_before_forward_done | corrupt |
| … and unpack | release_before_unpack | corrupt |
| A send region is reused after the reader's release | reuse_send_region_before_release | corrupt |
| … and its writes' local completion | reuse_send_region_before_local_completion | corrupt |
| Forwarding never depends on the hook | forward_in_hook | deadlock |
| The forwarder's sum never depends on the hook | sum_in_hook | deadlock |
| A third un-hooked call raises (1) | third_unhooked_call | deadlock |
| A rank that raises still takes part (2) | raise_without_taking_part | wrong, mismatch |
| A call with a hook is one round | hooked_call_in_rounds | wrong, deadlock |
| Before epoch e, own receives up to e − 2 end (3) | older_receive_left_to_hook | deadlock |
| Rounds are the maximum over all ranks | own_round_counts | wrong, deadlock |
| … learnt from all R first headers | count_from_own_node | wrong, deadlock |
| … or ⌈M/C⌉ with an agreed M | count_from_own_tokens | wrong, deadlock |
| Empty rounds are sent up to the maximum | no_empty_rounds | deadlock |
| Own rounds are sent at most two ahead | more_than_two_rounds_ahead | deadlock |
| Every source sends a header, even with no rows | no_header_when_empty | deadlock |
| Immediates are counted per (row, epoch) | epoch_bits_not_checked | deadlock, wrong |
| A message is complete with all of its writes | read_at_first_write | wrong |
| A forwarder's header carries its node's status | forwarder_drops_status | wrong |
| A combine uses the rows of its own dispatch | rows_of_latest_dispatch | wrong |

(1) Shown without rule (3): a rank that completes its older receives itself does not deadlock at a
third un-hooked call, which is then wrong only towards the user. (2) The rank that raised goes on,
and its next message is taken for the one it left out: the others get wrong rows and no error.
(3) "At most two un-hooked calls" does not imply it: the older of two may be any number of epochs
old. `hooks` never has three un-hooked calls, and deadlocks without this rule.
"""

from __future__ import annotations

import random

import pytest
from protocol_model import VARIANTS, Simulation
from protocol_state import Immediate
from protocol_world import SCENARIOS, World

SMALL = World(2, 2)
WORLDS = [SMALL, World(2, 2, "rank"), World(3, 2), World(1, 3), World(3, 1), World(2, 3, "rank")]
FIRST_EPOCHS = (0, 1, 59, 60, 61, 62, 63)

# variant → (scenario that shows it, whether hops="rank" has the rule, what is seen)
BREACHES = {
    "separate_sequences": ("handles", True, {"corrupt", "wrong", "mismatch"}),
    "kind_not_checked": ("different_calls", True, {"wrong"}),
    "narrow_epochs": ("mixed", True, {"deadlock"}),
    "flags_reset_by_reader": ("hooks", True, {"deadlock"}),
    "no_credit_check": ("mixed", True, {"corrupt"}),
    "forwarder_without_credit": ("rounds", False, {"corrupt"}),
    "single_release_counter": ("hooks", True, {"corrupt"}),
    "boolean_release_flag": ("mixed", True, {"deadlock"}),
    "piggybacked_release": ("rounds", True, {"deadlock"}),
    "release_before_forward_done": ("rounds", False, {"corrupt"}),
    "release_before_unpack": ("hooks", False, {"corrupt"}),
    "reuse_send_region_before_release": ("rounds", True, {"corrupt"}),
    "reuse_send_region_before_local_completion": ("rounds", True, {"corrupt"}),
    "forward_in_hook": ("hooks", False, {"deadlock"}),
    "sum_in_hook": ("hooks", False, {"deadlock"}),
    "third_unhooked_call": ("third_unhooked", True, {"deadlock"}),
    "raise_without_taking_part": ("wrong_input", True, {"wrong", "mismatch"}),
    "hooked_call_in_rounds": ("too_long_for_a_hook", True, {"wrong", "deadlock"}),
    "older_receive_left_to_hook": ("hooks", True, {"deadlock"}),
    "own_round_counts": ("rounds", True, {"wrong", "deadlock"}),
    "count_from_own_node": ("rounds", True, {"wrong", "deadlock"}),
    "count_from_own_tokens": ("agreed_rounds", True, {"wrong", "deadlock"}),
    "no_empty_rounds": ("rounds", True, {"deadlock"}),
    "more_than_two_rounds_ahead": ("rounds", True, {"deadlock"}),
    "no_header_when_empty": ("mixed", True, {"deadlock"}),
    "epoch_bits_not_checked": ("rounds", True, {"deadlock", "wrong"}),
    "read_at_first_write": ("mixed", True, {"wrong"}),
    "forwarder_drops_status": ("wrong_input", False, {"wrong"}),
    "rows_of_latest_dispatch": ("handles", False, {"wrong"}),
}
CASES = [
    pytest.param(variant, hops, id=f"{variant}-{hops}")
    for variant, (_, any_hops, _) in BREACHES.items()
    for hops in (("node", "rank") if any_hops else ("node",))
]


def simulate(scenario: str, world: World, seed: int, broken: str | None = None, **options) -> str:
    """Run one seed: it decides the program, the schedule and the first epoch."""
    rng = random.Random(seed)
    first_epoch = rng.choice(FIRST_EPOCHS)
    program = SCENARIOS[scenario](rng, world)
    return Simulation(world, program, seed, broken, first_epoch, **options).run()


@pytest.mark.parametrize("scenario", [name for name in SCENARIOS if name != "different_calls"])
@pytest.mark.parametrize("world", WORLDS, ids=str)
def test_baseline(world, scenario):
    for seed in range(24):
        assert simulate(scenario, world, seed) == "ok", f"seed {seed}"


@pytest.mark.parametrize("world", [World(4, 1), World(4, 2), World(2, 4)], ids=str)
def test_baseline_on_larger_worlds(world):
    for seed in range(15):
        assert simulate("mixed", world, seed) == "ok", f"seed {seed}"


@pytest.mark.parametrize("hops", ["node", "rank"])
def test_messages_of_up_to_64_writes(hops):
    for seed in range(8):
        assert simulate("handles", World(2, 2, hops), seed, max_writes=64) == "ok", f"seed {seed}"


@pytest.mark.parametrize(("variant", "hops"), CASES)
def test_every_rule_is_needed(variant, hops):
    scenario, _, seen = BREACHES[variant]
    world = World(2, 2, hops)
    for seed in range(100):
        outcome = simulate(scenario, world, seed, variant)
        kind = outcome.split(":")[0]
        if kind in seen:
            expected = "mismatch" if scenario == "different_calls" else "ok"
            assert simulate(scenario, world, seed).split(":")[0] == expected
            return
    pytest.fail(f"no seed shows what breaks without: {VARIANTS[variant]}")


@pytest.mark.parametrize("world", WORLDS, ids=str)
def test_different_calls_are_noticed(world):
    """The one fault that users cause: it is an error on some rank, never wrong data or a hang."""
    for seed in range(20):
        assert simulate("different_calls", world, seed).startswith("mismatch"), f"seed {seed}"


def test_every_variant_is_tested_and_in_the_table():
    assert set(BREACHES) == set(VARIANTS)
    rows = [row.split("|") for row in (__doc__ or "").splitlines() if row.startswith("| ")]
    table = {row[2].strip(): set(row[3].strip().split(", ")) for row in rows[1:]}
    assert table == {variant: seen for variant, (_, _, seen) in BREACHES.items()}
    with pytest.raises(ValueError, match="key of VARIANTS"):
        simulate("mixed", SMALL, 0, "no such rule")


@pytest.mark.parametrize("table_row", [0, 1, (1 << 19) - 1])
@pytest.mark.parametrize("epoch", [0, 63])
@pytest.mark.parametrize("num_writes", [1, 64])
def test_an_immediate_has_32_bits(table_row, epoch, num_writes):
    immediate = Immediate(table_row, epoch, num_writes)
    assert immediate.pack() >> 31 == 1
    assert Immediate.unpack(immediate.pack()) == immediate
    assert Immediate(table_row, epoch + 64, num_writes).pack() == immediate.pack()
