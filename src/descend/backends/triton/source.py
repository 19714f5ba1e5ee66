"""Plain Python functions as Triton wants their source: no annotations, no docstrings, nothing hidden in a closure."""

from __future__ import annotations

import ast
import dis
import hashlib
import inspect
import linecache
import textwrap
from collections.abc import Mapping
from types import CodeType, FunctionType, ModuleType
from typing import Any, NamedTuple

import triton
import triton.language as tl
from triton import knobs

_CONSTEXPR = "tl.constexpr"


class Origin(NamedTuple):
    """Where a rewritten function was written.

    Attributes:
        file: the file.
        lines: for each line of the rewritten function, the line in that file.
    """

    file: str
    lines: dict[int, int]


_origins: dict[str, Origin] = {}


def jitted(function: FunctionType) -> Any:
    """What ``triton.jit`` makes of ``function``, or Triton's interpreter if that is on.

    Raises:
        ValueError: if the source cannot be found.
    """
    definition, origin = _definition(function)
    # Reading the rewritten text gives the lines that Triton will complain of.
    text = ast.unparse(definition) + "\n"
    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    written = ast.parse(text)
    pairs = zip(ast.walk(ast.Module([definition], [])), ast.walk(written), strict=True)
    lines = {new.lineno: old.lineno for old, new in pairs if isinstance(new, ast.stmt) and isinstance(old, ast.stmt)}
    _origins[text] = Origin(origin, lines)
    file = f"<descend {definition.name} {digest}>"
    # Without a modification time, linecache never drops a file that does not exist.
    linecache.cache[file] = len(text), None, text.splitlines(keepends=True), file
    namespace = _namespace(function, written)
    exec(compile(written, file, "exec"), namespace)
    return triton.jit(namespace[definition.name])


def origin(text: str) -> Origin | None:
    """Where the function was written that was rewritten to ``text``."""
    return _origins.get(text if text.endswith("\n") else text + "\n")


def _definition(function: FunctionType) -> tuple[ast.FunctionDef, str]:
    """The rewritten definition, with the lines of the file; and the file."""
    try:
        lines, first = inspect.getsourcelines(function)
    except (OSError, TypeError) as error:
        raise ValueError("its source cannot be found: it was not read from a file") from error
    tree = ast.increment_lineno(ast.parse(textwrap.dedent("".join(lines))), max(first, 1) - 1)
    found = tree.body[0] if tree.body else None
    if not isinstance(found, ast.FunctionDef):
        raise ValueError("it is not made by def")
    found.returns, found.decorator_list = None, []
    if _digest(_code_of(found, function.__code__.co_freevars)) != _digest(function.__code__):
        raise ValueError("its source has been edited since it was imported")
    arguments = found.args
    arguments.args, arguments.posonlyargs = arguments.posonlyargs + arguments.args, []
    for argument in (*arguments.args, *arguments.kwonlyargs):
        if argument.annotation is not None and ast.unparse(argument.annotation) != _CONSTEXPR:
            argument.annotation = None
    arguments.defaults = [ast.Constant(value) for value in function.__defaults__ or ()]
    if arguments.kwonlyargs:  # Triton knows none before 3.9
        defaults = function.__kwdefaults__ or {}
        for argument in arguments.kwonlyargs:
            if argument.arg not in defaults:
                raise ValueError(f"its keyword-only argument {argument.arg} has no default")
            arguments.args.append(argument)
            arguments.defaults.append(ast.Constant(defaults[argument.arg]))
        arguments.kwonlyargs, arguments.kw_defaults = [], []
    if ast.get_docstring(found, clean=False) is not None and len(found.body) > 1:
        del found.body[0]
    own = function.__code__.co_varnames
    found = _Plain({name: value for name, value in _globals(function).items() if name not in own}).visit(found)
    return ast.fix_missing_locations(found), function.__code__.co_filename


def _code_of(definition: ast.FunctionDef, free: tuple[str, ...]) -> CodeType:
    """What Python makes of a definition inside a function that has the variables ``free``."""
    module = ast.parse(f"def outer():\n    {' = '.join((*free, 'last'))} = None")
    outer = module.body[0]
    assert isinstance(outer, ast.FunctionDef)
    outer.body.append(definition)
    return _inner(_inner(compile(module, "", "exec"), "outer"), definition.name)


def _inner(code: CodeType, name: str) -> CodeType:
    return next(const for const in code.co_consts if isinstance(const, CodeType) and const.co_name == name)


def _digest(code: CodeType) -> str:
    """The names, operators, variables and constants of a function. How it calls others depends on its module, too."""
    kinds = ("BINARY", "COMPARE", "UNARY", "LOAD_FAST", "LOAD_CONST", "LOAD_SMALL_INT")
    found = [step for step in dis.get_instructions(code) if step.opname.startswith(kinds)]
    steps = [(step.opname, step.argrepr) for step in found if not isinstance(step.argval, CodeType)]
    return repr((code.co_names, steps))


class _Plain(ast.NodeTransformer):
    """Writes ``x: Any = y`` as ``x = y``, and ``x ** 3``, for which Triton has no operator, as ``x * x * x``.

    Numbers of modules and classes become literals: Triton's cache on disk does not see when they change.

    Args:
        known: the values behind the names that the function does not set itself.
    """

    def __init__(self, known: Mapping[str, Any]) -> None:
        self._known = known

    def visit_Attribute(self, node: ast.Attribute) -> ast.AST:
        self.generic_visit(node)
        path, owner = [node.attr], node.value
        while isinstance(owner, ast.Attribute):
            path, owner = [owner.attr, *path], owner.value
        if not isinstance(owner, ast.Name) or not isinstance(self._known.get(owner.id), ModuleType | type):
            return node
        value = self._known[owner.id]
        for name in path:
            value = getattr(value, name, None)
        # Subclasses of numbers, such as NumPy's, are written otherwise than numbers; NaN cannot be written at all.
        plain = next((kind(value) for kind in (bool, int, float) if isinstance(value, kind)), None)
        return node if plain is None or plain != plain else ast.copy_location(ast.Constant(plain), node)

    def visit_BoolOp(self, node: ast.BoolOp) -> ast.AST:
        self.generic_visit(node)
        if not all(map(_is_condition, node.values)):
            raise ValueError(f"{ast.unparse(node)}: `and` and `or` may only join comparisons")
        return node

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST:
        self.generic_visit(node)
        if node.value is None:
            return ast.copy_location(ast.Pass(), node)
        return ast.copy_location(ast.Assign([node.target], node.value), node)

    def visit_BinOp(self, node: ast.BinOp) -> ast.AST:
        self.generic_visit(node)
        times = node.right.value if isinstance(node.op, ast.Pow) and isinstance(node.right, ast.Constant) else None
        if times not in (2, 3):
            return node
        product = ast.copy_location(ast.BinOp(node.left, ast.Mult(), node.left), node)
        return product if times == 2 else ast.copy_location(ast.BinOp(product, ast.Mult(), node.left), node)


def _is_condition(node: ast.expr) -> bool:
    """Whether an operand of ``and`` is a truth value: of numbers, Triton gives others than Python."""
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        return True
    return isinstance(node, ast.Compare | ast.BoolOp) or (isinstance(node, ast.Constant) and type(node.value) is bool)


def _globals(function: FunctionType) -> dict[str, Any]:
    """The globals of ``function`` and the variables of its closure."""
    cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
    return {**function.__globals__, **{name: cell.cell_contents for name, cell in cells}}


def _namespace(function: FunctionType, tree: ast.Module) -> dict[str, Any]:
    """The globals of a rewritten function: those of ``function``, with its closure and with numbers as constants."""
    namespace = _globals(function)
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and not knobs.runtime.interpret:
            value = namespace.get(node.id)
            if isinstance(value, int | float):
                namespace[node.id] = tl.constexpr(value)
    # The interpreter looks for Triton's language among a function's globals.
    return {**namespace, "_descend_tl": tl}
