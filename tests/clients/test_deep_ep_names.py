"""Names and signatures of `moe_comm.deep_ep`, the record of DeepEP's, and the page for those who move: they agree."""

import functools
import importlib
import inspect
import re
from pathlib import Path
from types import ModuleType

import pytest
import torch
from deep_ep_record import ATTRIBUTE, BY_KEYWORD, GENERATIONS, RECORD

import moe_comm
from moe_comm import deep_ep

PAGE = Path(deep_ep.__file__).with_name("README.md")
OF_THE_PAGE = dict(zip(("1.2.1", "1-last", "2", "hybrid-ep"), GENERATIONS, strict=True))
CLASSES = (
    *("Buffer", "ElasticBuffer", "EPHandle", "HybridEPBuffer", "Config"),
    *("EventHandle", "EventOverlap"),
)
OURS = {  # nobody asks DeepEP for them
    *("EPHandle.of", "EPHandle.num_rows", "EPHandle.reordered"),
    *(
        "HybridEPBuffer.group",
        "HybridEPBuffer.rank",
        "HybridEPBuffer.group_size",
        "HybridEPBuffer.runtime",
    ),
}


@functools.cache
def instances():
    """One object of each class: some names are set in __init__."""
    group = moe_comm.EPGroup.threads(1)[0]
    elastic = deep_ep.ElasticBuffer(group, num_max_tokens_per_rank=4, hidden=16, num_topk=1)
    idx = torch.zeros(2, 1, dtype=torch.int64)
    *_, handle, _ = elastic.dispatch(torch.zeros(2, 16), idx, num_experts=1)
    return {
        "Buffer": deep_ep.Buffer(group, low_latency_mode=True),
        "ElasticBuffer": elastic,
        "EPHandle": handle,
        "HybridEPBuffer": deep_ep.HybridEPBuffer(group, 16, 4, 1),
        "Config": deep_ep.Config(),
        "EventHandle": deep_ep.EventHandle(),
        "EventOverlap": deep_ep.EventOverlap(),
    }


def resolve(name, of_instances=False):
    """What `name` is here; AttributeError if it is not."""
    first, _, rest = name.partition(".")
    with_argument = re.fullmatch(r"(.+)\((\w+)\)", name)
    if with_argument:
        function, argument = with_argument.groups()
        if argument not in inspect.signature(resolve(function)).parameters:
            raise AttributeError(name)
        return argument
    if first in CLASSES and rest:
        owner = instances()[first] if of_instances else getattr(deep_ep, first)
        return getattr(owner, rest)
    found = deep_ep
    for part in name.split("."):
        if isinstance(found, ModuleType) and not hasattr(found, part):
            try:
                importlib.import_module(f"{found.__name__}.{part}")
            except ModuleNotFoundError:
                raise AttributeError(name) from None
        found = getattr(found, part)
    return found


def is_here(name):
    try:
        resolve(name, of_instances=True)
    except AttributeError:
        return False
    return True


def spelled(function):
    """As in the record. The words after "*" are by keyword only."""
    out, named = [], False
    for p in inspect.signature(function).parameters.values():
        if p.kind is p.KEYWORD_ONLY and not named:
            named = True
            out.append("*")
        if p.kind is p.VAR_KEYWORD:
            out.append("**" + p.name)
        else:
            assert p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
            out.append(p.name if p.default is p.empty else f"{p.name}={p.default}")
    return out


# --- signatures ----------------------------------------------------------------------------------

SIGNED = [name for name, made in RECORD.items() if set(made.values()) != {ATTRIBUTE}]


@pytest.mark.parametrize("name", SIGNED)
def test_signatures_of_all_generations(name):
    ours = spelled(resolve(name))
    generations = [text.split() for text in RECORD[name].values()]
    for theirs in generations:
        assert set(theirs) <= set(ours), "a parameter is missing, or its default differs"
        ordered = [p for p in theirs if p.split("=")[0] not in BY_KEYWORD.get(name, ())]
        assert ours[: len(ordered)] == ordered
    assert set(ours) == set().union(*generations), "parameters that DeepEP never had"


def test_methods_that_need_no_instance():
    for name in SIGNED:
        owner, _, method = name.partition(".")
        if method and owner in CLASSES:
            found = inspect.getattr_static(getattr(deep_ep, owner), method)
            is_method = all(text.startswith("self") for text in RECORD[name].values())
            assert isinstance(found, staticmethod) == (not is_method), name


# --- names ---------------------------------------------------------------------------------------


def offered():
    """Every public name of `moe_comm.deep_ep`: of the package, of the modules that clients import, of the classes."""
    yield from deep_ep.__all__
    yield "__version__"
    for module in ("buffers", "utils", "utils.event", "utils.envs", "utils.math", "_C"):
        names = getattr(resolve(module), "__all__", None)
        if names is None:
            names = [
                n for n, v in vars(resolve(module)).items()
                if inspect.isfunction(v) and v.__module__ == resolve(module).__name__
            ]  # fmt: skip
        yield from (f"{module}.{n}" for n in names)
    for name in CLASSES:
        found = instances()[name]
        yield from (f"{name}.{n}" for n in {*dir(found), *vars(found)} if not n.startswith("_"))


def test_nothing_else_is_offered():
    """A name advertises what it does: clients ask by hasattr."""
    assert set(offered()) - set(RECORD) == OURS
    for name in ("EventOverlap.__call__", "EventOverlap.__enter__", "Buffer._unpack_bias"):
        assert is_here(name)


def test_one_thing_has_one_identity():
    for name in RECORD:
        last = name.split(".")[-1]
        if last in deep_ep.__all__ and is_here(name) and name.split(".")[0] not in CLASSES:
            assert resolve(name) is getattr(deep_ep, last), name


# --- the page ------------------------------------------------------------------------------------


def rows():
    """(names, generations, verdict, reason) of each row of the page's tables."""
    for line in PAGE.read_text().splitlines():
        if line.startswith("| `"):
            names, generations, verdict, reason = (cell.strip() for cell in line[1:-1].split("|"))
            yield re.findall(r"`([^`]+)`", names), generations.split(", "), verdict, reason


def test_page_has_every_name_of_every_generation():
    named = [name for names, *_ in rows() for name in names]
    assert len(named) == len(set(named)), "a name stands twice"
    assert set(named) == set(RECORD)
    for names, generations, _, _ in rows():
        for name in names:
            assert [OF_THE_PAGE[g] for g in generations] == list(RECORD[name]), name


def test_page_says_what_is_here():
    for names, _, verdict, reason in rows():
        assert verdict in ("same", "better", "differs", "absent"), names
        assert verdict == "same" or reason, f"{names}: {verdict}, and no reason"
        for name in names:
            assert is_here(name) == (verdict != "absent"), name


def test_readme_leads_to_the_page():
    readme = Path(__file__).parents[2] / "README.md"
    assert "(moe_comm/deep_ep/README.md)" in readme.read_text()
    for path in re.findall(r"`((?:examples|moe_comm)/[\w./]+)`", PAGE.read_text()):
        assert (readme.parent / path).exists(), path
