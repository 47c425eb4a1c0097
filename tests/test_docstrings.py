"""Every public name says in its docstring what goes in, what comes out, what is refused; an op, what it costs."""

import ast
import dataclasses
import inspect
import re
import textwrap
from importlib import import_module
from itertools import pairwise

import pytest

FACES = [
    *("ghostgram", "ghostgram.taps"),
    *(f"ghostgram.algorithms.{name}" for name in ("in_run_shapley", "mates", "pad", "velocitune")),
]
CALLBACKS = [
    *("hf.InRunShapleyCallback", "hf_mates.MatesCallback", "hf_velocitune.VelocituneCallback"),
    *("lightning.InRunShapleyCallback", "lightning_mates.MatesCallback", "lightning_velocitune.VelocituneCallback"),
    "hf.causal_lm_losses",
]


def public():
    """Every public name once, by the shortest of its paths."""
    found = {}
    for face in FACES:
        module = import_module(face)
        for name in module.__all__:
            found.setdefault(getattr(module, name), f"{face}.{name}")
    for path in CALLBACKS:
        module, name = path.split(".")
        found[getattr(import_module(f"ghostgram.integrations.{module}"), name)] = f"ghostgram.integrations.{path}"
    return [pytest.param(each, id=path) for each, path in found.items()]


def sections(doc):
    """A docstring by its headings; what stands before them under ""."""
    found, name = {"": ""}, ""
    for line in inspect.cleandoc(doc or "").splitlines():
        if heading := re.fullmatch(r"([A-Z]\w+):", line):
            name = heading[1]
            found[name] = ""
        else:
            found[name] += line + "\n"
    return found


def parameters(function):
    """Names and annotations of what a caller gives."""
    given = inspect.signature(function).parameters.values()
    return {each.name: str(each.annotation) for each in given if each.name not in ("self", "cls")}


def described(said):
    """What a docstring says of each argument."""
    parts = re.split(r"^    \*{0,2}(\w+):", said.get("Args", ""), flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def raises(function):
    """The names of the exceptions that a function itself raises by name."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    thrown = [node.exc for node in ast.walk(tree) if isinstance(node, ast.Raise) and node.exc]
    names = {each.func.id for each in thrown if isinstance(each, ast.Call) and isinstance(each.func, ast.Name)}
    return {name for name in names if not name.startswith("_")}


def missing(function, names=None):
    """What a function's docstring does not say; of its arguments those named."""
    said = sections(function.__doc__)
    given = parameters(function)
    told = described(said)
    found = [f"argument {name}" for name in (given if names is None else names) if name not in told]
    nothing = inspect.signature(function).return_annotation in (None, "None", inspect.Signature.empty)
    if names is None and not nothing and not {*said} & {"Returns", "Yields"}:
        found.append("what is returned")
    return found + unsaid(said, function)


def unsaid(said, function):
    """The exceptions of a function that a docstring does not name."""
    return [f"when {name} is raised" for name in sorted(raises(function)) if name not in said.get("Raises", "")]


def missing_of_op(function):
    """What an op's docstring does not say beside: shapes, cost, where it comes from."""
    said = sections(function.__doc__)
    arrays = [name for name, annotation in parameters(function).items() if annotation.startswith("Array")]
    shapeless = [name for name in arrays if not re.search(r"\(|shape|like \w", described(said)[name])]
    return [f"shape of {name}" for name in shapeless] + [each for each in ("Cost", "Source") if each not in said]


def fields(cls):
    """The fields of a dataclass or a named tuple that no string below them documents."""
    body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0].body
    explained = {
        first.target.id
        for first, second in pairwise(body)
        if isinstance(first, ast.AnnAssign) and isinstance(second, ast.Expr) and isinstance(second.value, ast.Constant)
    }
    names = [field.name for field in dataclasses.fields(cls)] if dataclasses.is_dataclass(cls) else cls._fields
    attributes = sections(cls.__doc__).get("Attributes", "") + sections(cls.__doc__).get("Args", "")
    return [f"field {name}" for name in names if name not in explained and f"{name}:" not in attributes]


def constructed(cls):
    """What a class that is made by calling it does not say of its arguments."""
    said = sections(cls.__doc__)
    found = [f"argument {name}" for name in parameters(cls.__init__) if name not in described(said)]
    return found + unsaid(said, cls.__init__)


def methods(cls):
    """The public functions of a class, less those of its bases: a Trainer's events are the Trainer's to document."""
    for name, each in vars(cls).items():
        function = getattr(each, "__func__", each)
        inherited = any(hasattr(base, name) for base in cls.__mro__[1:])
        if not name.startswith("_") and not inherited and inspect.isfunction(function):
            yield name, inspect.unwrap(function)


@pytest.mark.parametrize("each", public())
def test_a_public_name_is_documented(each):
    assert sections(each.__doc__)[""].strip()
    if not inspect.isclass(each):
        function = inspect.unwrap(each)
        assert missing(function) == []
        assert not function.__module__.startswith("ghostgram.ops.") or missing_of_op(function) == []
    elif dataclasses.is_dataclass(each) or hasattr(each, "_fields"):
        assert fields(each) == []
    elif not issubclass(each, Exception):
        assert constructed(each) == []
    for name, method in methods(each) if inspect.isclass(each) else ():
        names = [*parameters(method)]
        # One argument, and the result, may be told by the one sentence of a method.
        assert (name, method.__doc__ and missing(method, names if len(names) > 1 else [])) == (name, [])


def documented(a, b):
    """Does it.

    Args:
        a: The first.
    """
    if a:
        raise ValueError("a: expected nothing")
    return b


def test_the_check_sees_what_is_missing():
    assert missing(documented) == ["argument b", "when ValueError is raised"]
    documented.__annotations__["return"] = int
    assert missing(documented) == ["argument b", "what is returned", "when ValueError is raised"]
