"""One source file, read by libcst: functions by name, statements by shape, and the hunks that go there."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property

import libcst as cst
from libcst import matchers as m
from libcst.metadata import MetadataWrapper, ParentNodeProvider, PositionProvider

from moc_ckpt.patching.marks import Hunk, Line
from moc_ckpt.patching.patch import Missing

__all__ = ["Function", "Source", "text_of"]

_BLOCKS = (cst.IndentedBlock, cst.Module)


class Source:
    """A file without marks.

    Args:
        file: its name, relative to the root of the tree; for messages.
        base: its lines.

    Raises:
        Missing: if it is not Python, or has line ends that only Python would take for some.
    """

    def __init__(self, file: str, base: Sequence[Line]) -> None:
        if any(line.end == "\r" for line in base):
            raise Missing(file, "", r"line ends that are \n or \r\n")
        self.file = file
        self.base = base
        data = "".join(line.text + line.end for line in base).encode("latin-1")
        try:
            self._wrapper = MetadataWrapper(cst.parse_module(data), unsafe_skip_copy=True)
        except (cst.ParserSyntaxError, UnicodeDecodeError, LookupError, SyntaxError) as error:
            raise Missing(file, "", f"Python source ({type(error).__name__})") from None
        self.module = self._wrapper.module

    @cached_property
    def _positions(self) -> dict[cst.CSTNode, cst.metadata.CodeRange]:
        return dict(self._wrapper.resolve(PositionProvider))

    @cached_property
    def _parents(self) -> dict[cst.CSTNode, cst.CSTNode]:
        return dict(self._wrapper.resolve(ParentNodeProvider))

    def code(self, node: cst.CSTNode, *, function: str = "") -> str:
        """Returns the source text of an expression, in the bytes of the file.

        Raises:
            Missing: if it is not on one line.
        """
        text = self.module.code_for_node(node)
        if re.search(r"[\r\n#]", text):
            raise Missing(self.file, function, f"one line instead of {' '.join(text.split())!r}")
        # A byte order mark belongs to the file, not to every piece of it.
        return text.encode(self.module.encoding.removesuffix("-sig")).decode("latin-1")

    def parent(self, node: cst.CSTNode) -> cst.CSTNode:
        """Returns the node around another."""
        return self._parents[node]

    def first(self, node: cst.CSTNode) -> int:
        """Returns the index of the base line that a statement begins on, decorators included."""
        start = self._positions[node].start.line
        if isinstance(node, cst.FunctionDef | cst.ClassDef) and node.decorators:
            start = min(start, self._positions[node.decorators[0]].start.line)
        return start - 1

    def behind(self, node: cst.CSTNode) -> int:
        """Returns the index of the base line after a statement."""
        return self._positions[node].end.line

    def find(self, name: str) -> Function | None:
        """Returns a function or method by its qualified name; None if there is none.

        Raises:
            Missing: if there are several.
        """
        *owners, last = name.split(".")
        scopes: list[cst.CSTNode] = [self.module]
        for owner in owners:
            kinds = (node for scope in scopes for node in _statements(scope))
            scopes = [node.body for node in kinds if isinstance(node, cst.ClassDef) and node.name.value == owner]
        nodes = (node for scope in scopes for node in _statements(scope))
        found = [node for node in nodes if isinstance(node, cst.FunctionDef) and node.name.value == last]
        if len(found) > 1:
            raise Missing(self.file, name, f"one function of this name, not {len(found)}")
        return Function(self, name, found[0]) if found else None

    def require(self, name: str) -> Function:
        """Returns a function or method by its qualified name.

        Raises:
            Missing: if there is none, or several.
        """
        found = self.find(name)
        if found is None:
            raise Missing(self.file, name, "this function")
        return found

    def statement(self, node: cst.CSTNode) -> cst.CSTNode:
        """Returns the innermost statement around a node that has its lines to itself."""
        while not isinstance(self._parents[node], _BLOCKS) or isinstance(node, cst.IndentedBlock):
            node = self._parents[node]
        return node

    def function_of(self, node: cst.CSTNode) -> cst.CSTNode:
        """Returns the innermost function around a node; the module if there is none."""
        while not isinstance(node, cst.Module):
            node = self._parents[node]
            if isinstance(node, cst.FunctionDef):
                break
        return node

    def before(self, patch: str, node: cst.CSTNode, *added: str) -> Hunk:
        """Returns a hunk in front of a statement and the comment that belongs to it, with its indentation.

        A tab in `added` is one level.
        """
        at = self.first(node)
        indent = self.base[at].indent
        for line in reversed(getattr(node, "leading_lines", ())):
            if line.comment is None or self.base[at - 1].indent != indent:
                break
            at -= 1
        return self._hunk(patch, at, indent, added)

    def after(self, patch: str, node: cst.CSTNode, *added: str, function: str = "") -> Hunk:
        """Returns a hunk behind a statement, with its indentation.

        Raises:
            Missing: if the file ends there without a line end.
        """
        at = self.behind(node)
        if not self.base[at - 1].end:
            raise Missing(self.file, function, "a line end at the end of the file")
        return self._hunk(patch, at, self.base[self.first(node)].indent, added)

    def commented(self, patch: str, node: cst.CSTNode, *added: str) -> Hunk:
        """Returns a hunk that comments a statement out and stands in front of it."""
        start = self.first(node)
        hunk = self._hunk(patch, start, self.base[start].indent, added)
        return Hunk(patch, start, hunk.added, self.behind(node) - start)

    def _hunk(self, patch: str, at: int, indent: str, added: Iterable[str]) -> Hunk:
        level = "\t" if "\t" in indent else "    "
        lines = [(len(line) - len(line.lstrip("\t"))) * level + line.lstrip("\t") for line in added]
        return Hunk(patch, at, tuple(indent + line for line in lines))

    def imports(self) -> Iterator[tuple[str, cst.ImportFrom | cst.Import]]:
        """Yields the absolute names of modules that are imported anywhere, with the import."""
        for node in m.findall(self.module, m.Import() | m.ImportFrom()):
            if isinstance(node, cst.Import):
                for alias in node.names:
                    yield text_of(alias.name), node
            elif isinstance(node, cst.ImportFrom) and node.module is not None and not node.relative:
                yield text_of(node.module), node

    def attributes(self) -> set[str]:
        """Returns the names of all attributes that are used anywhere."""
        found = m.findall(self.module, m.Attribute())
        return {node.attr.value for node in found if isinstance(node, cst.Attribute)}

    def strings(self) -> set[str]:
        """Returns all simple string literals."""
        found = m.findall(self.module, m.SimpleString())
        return {value for node in found if isinstance(value := _value(node), str)}


class Function:
    """A function of a source.

    Args:
        source: its file.
        name: its qualified name.
        node: its definition.
    """

    def __init__(self, source: Source, name: str, node: cst.FunctionDef) -> None:
        self.source = source
        self.name = name
        self.node = node

    @property
    def parameters(self) -> list[str]:
        """Names of the positional parameters."""
        params = self.node.params
        return [param.name.value for param in (*params.posonly_params, *params.params)]

    def missing(self, expected: str) -> Missing:
        """Returns what is raised when something in it was not found."""
        return Missing(self.source.file, self.name, expected)

    def findall(self, matcher: m.BaseMatcherNode | m.OneOf[m.BaseMatcherNode]) -> list[cst.CSTNode]:
        """Returns all nodes of a shape in its body."""
        return list(m.findall(self.node.body, matcher))

    def names(self) -> set[str]:
        """Returns all plain names in its body."""
        return {node.value for node in self.findall(m.Name()) if isinstance(node, cst.Name)}

    def calls(self, name: str) -> bool:
        """Tells whether it calls a function by that name."""
        return bool(self.findall(m.Call(func=m.Name(name))))

    def top(self, node: cst.CSTNode) -> cst.CSTNode:
        """Returns the statement of its own body that a node is in."""
        while self.source.parent(node) is not self.node.body:
            node = self.source.parent(node)
        return node

    def start(self) -> cst.CSTNode:
        """Returns the first statement after the docstring.

        Raises:
            Missing: if there is none, or not on a line of its own.
        """
        body = self.node.body
        if not isinstance(body, cst.IndentedBlock):
            raise self.missing("a body on lines of its own")
        docstring = m.SimpleStatementLine(body=[m.Expr(m.SimpleString() | m.ConcatenatedString())])
        statements = list(body.body)
        if m.matches(statements[0], docstring):
            statements.pop(0)
        if not statements:
            raise self.missing("a statement besides the docstring")
        return statements[0]

    def returns_something(self) -> bool:
        """Tells whether it has a return with a value."""
        return any(isinstance(node, cst.Return) and node.value for node in self.findall(m.Return()))

    def values(self) -> dict[str, cst.BaseExpression]:
        """Returns what is assigned to subscripts with constant strings, by that string."""
        found: dict[str, cst.BaseExpression] = {}
        for node in self.findall(m.Assign()):
            assert isinstance(node, cst.Assign)
            for target in node.targets:
                index = m.extract(
                    target.target,
                    m.Subscript(slice=[m.SubscriptElement(m.Index(m.SaveMatchedNode(m.SimpleString(), "key")))]),
                )
                key = _value(index["key"]) if index else None
                if isinstance(key, str):
                    found[key] = node.value
        return found


def text_of(node: cst.CSTNode) -> str:
    """Returns a dotted name as text."""
    return "".join(cst.Module([]).code_for_node(node).split())


def _value(node: object) -> str | bytes | None:
    return node.evaluated_value if isinstance(node, cst.SimpleString) else None


def _statements(scope: cst.CSTNode) -> Iterator[cst.CSTNode]:
    """Yields the statements of a scope, also those under conditions, but not those of inner scopes."""
    for node in scope.children:
        if isinstance(node, cst.FunctionDef | cst.ClassDef):
            yield node
        elif isinstance(
            node, cst.If | cst.Else | cst.Try | cst.TryStar | cst.ExceptHandler | cst.With | cst.IndentedBlock
        ):
            yield from _statements(node)
