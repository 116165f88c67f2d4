"""What the source of a chat template proves about its generation prompt: that it is the same whatever messages say.

Where a prompt was found once, it then need not be asked for again in each row. Jinja's syntax tree is read like a
program whose values are only known by what they depend on.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from typing import Any, NamedTuple

from jinja2 import nodes

from lightning_qlora.data.template_environment import compile_template

__all__ = ["PromptProof", "prove_prompt"]


class PromptProof(NamedTuple):
    """What the source of a template proves about the text between the last content of a prompt and the prompt's end.

    Attributes:
        behind_others: That text is the same for all chats, behind messages that are not the assistant's.
        behind_answers: It is so behind the assistant's messages, too.
    """

    behind_others: bool
    behind_answers: bool


@lru_cache(maxsize=256)
def prove_prompt(source: str) -> PromptProof:
    """Read in a template's source whether its prompts can differ by what messages say.

    They cannot where ``add_generation_prompt`` decides about nothing but text that variables make up, and where no
    text before it depends both on contents and on what comes later in the chat. A template that looks for
    ``/no_think`` in the last message proves nothing of the kind, so it has to be asked for every prompt.
    """
    tree = compile_template(source).environment.parse(source)
    return _Reading(tree).proof


_NOTHING, _ORDER, _CONTENT = range(3)
"""What an expression depends on: nothing but variables; roles and places, too; what messages say, too."""

_PROMPT = "add_generation_prompt"
_KIND_TESTS = frozenset({"defined", "undefined", "none", "string", "mapping", "iterable", "sequence"})
_LOGIC = (nodes.And, nodes.Or, nodes.Not)
_LATER = frozenset({"last", "nextitem", "length", "revindex", "revindex0"})


class _Place(NamedTuple):
    """Under which conditions a statement runs.

    Attributes:
        level: What they depend on.
        later: Whether they depend on messages that come later.
        in_answers: Whether they hold for the assistant's messages only.
        in_loop: Whether ``loop`` walks over messages, as far as one can tell.
        in_part: Whether ``loop`` walks over the parts of one message, or over the tools.
    """

    level: int = _NOTHING
    later: bool = False
    in_answers: bool = False
    in_loop: bool = False
    in_part: bool = False


class _Reading:
    """Reads a template until nothing new is learnt about its names; where in doubt, the worse is assumed.

    It keeps of each name what its values depend on, and besides: which depend on later messages, which are namespaces
    (and outlast a loop's round), which are arguments of macros, and which are given a value by what messages say.

    Attributes:
        proof: What was found.
    """

    def __init__(self, tree: nodes.Template) -> None:
        self._levels = {"messages": _CONTENT, "tools": _CONTENT, "loop": _ORDER}
        self._later_names = {"messages"}
        self._lasting: set[str] = set()
        self._parameters: set[str] = set()
        self._chosen: set[str] = set()
        before: tuple[dict[str, int], set[str]] | None = None
        while before != (self._levels, self._later_names):
            before = (dict(self._levels), set(self._later_names))
            self._fixed, self._num_asked = True, 0
            self._found: set[bool] = set()
            self._read(tree.body, _Place())
            self._pass_arguments(tree)
        names = [name for name in tree.find_all(nodes.Name) if name.name == _PROMPT and name.ctx == "load"]
        self._fixed &= len(names) == self._num_asked
        self.proof = PromptProof(self._fixed and False not in self._found, self._fixed and not self._found)

    def _read(self, statements: Iterable[nodes.Node], place: _Place) -> None:
        for statement in statements:
            if isinstance(statement, nodes.If):
                self._read_if(statement, place)
            elif isinstance(statement, nodes.For):
                self._read_for(statement, place)
            elif isinstance(statement, nodes.Assign):
                self._write(statement.node, place)
                kept = place.in_loop and isinstance(statement.target, nodes.NSRef)
                later = kept or place.later or self._is_later(statement.node, place.in_part)
                self._assign(statement.target, max(self._level(statement.node), place.level), later)
                self._chosen |= _names(statement.target) if place.level == _CONTENT else set()
            elif isinstance(statement, nodes.Output):
                self._write(statement, place)
            else:
                self._read_block(statement, place)

    def _read_if(self, statement: nodes.If, place: _Place) -> None:
        if asked := _count(statement.test, _PROMPT):
            self._num_asked += asked
            plain = isinstance(statement.test, nodes.Name)
            decided = [statement.test, *(statement.body if plain else [statement])]
            self._fixed &= place == _Place() and all(self._level(node) == _NOTHING for node in decided)
        inner = self._under(place, statement.test)
        self._read(statement.body, inner._replace(in_answers=place.in_answers or _wants_answer(statement.test)))
        self._read([*statement.elif_, *statement.else_], inner)

    def _read_for(self, statement: nodes.For, place: _Place) -> None:
        """Read a loop, whose names are forgotten after each round, but for what namespaces keep."""
        levels, later_names = dict(self._levels), set(self._later_names)
        self._assign(statement.target, _CONTENT, later=False)
        walked = isinstance(statement.iter, nodes.Name | nodes.Getattr | nodes.Getitem)  # all of it, in order
        level = min(self._level(statement.iter), _ORDER) if walked else self._level(statement.iter)
        in_part = self._is_part(statement.iter) and not self._is_later(statement.iter, place.in_part)
        inner = place._replace(level=max(place.level, level), in_loop=place.in_loop or not in_part, in_part=in_part)
        self._read(statement.body, inner if statement.test is None else self._under(inner, statement.test))
        self._read(statement.else_, inner)
        if any(statement.find_all((nodes.Break, nodes.Continue))):
            self._found.add(place.in_answers)
        self._levels = levels | {name: self._levels[name] for name in self._lasting if name in self._levels}
        self._later_names = later_names | (self._later_names & self._lasting)

    def _read_block(self, statement: nodes.Node, place: _Place) -> None:
        """Macros and filled blocks may do anything with what they are given; unknown statements prove nothing."""
        if isinstance(statement, nodes.Macro):
            self._parameters |= {argument.name for argument in statement.args}
            for name in (nodes.Name(statement.name, "store"), *statement.args):
                self._assign(name, _CONTENT, any(self._is_later(node, in_part=False) for node in statement.body))
        elif isinstance(statement, nodes.AssignBlock):
            later = place.later or any(self._is_later(node, place.in_part) for node in statement.body)
            self._assign(statement.target, _CONTENT, later)
        elif not isinstance(statement, nodes.CallBlock | nodes.Scope):
            self._fixed &= isinstance(statement, nodes.Break | nodes.Continue | nodes.ExprStmt)
            return
        self._read(statement.body, place)

    def _pass_arguments(self, tree: nodes.Template) -> None:
        for call in tree.find_all(nodes.Call):
            if any(self._is_later(argument, in_part=False) for argument in (*call.args, *call.kwargs)):
                macros = [macro for macro in tree.find_all(nodes.Macro) if macro.name in _names(call.node)]
                self._later_names |= {argument.name for macro in macros for argument in macro.args}

    def _under(self, place: _Place, test: nodes.Node) -> _Place:
        return place._replace(
            level=max(place.level, self._truth(test)), later=place.later or self._is_later(test, place.in_part)
        )

    def _write(self, node: nodes.Node, place: _Place) -> None:
        """Note what the text in ``node``, if there is any, depends on."""
        if isinstance(node, nodes.Output) and all(map(_raises, node.nodes)):
            return
        for choice in node.find_all(nodes.CondExpr):
            place = self._under(place, choice.test)
        if asked := _count(node, _PROMPT):
            self._num_asked += asked
            self._fixed &= isinstance(node, nodes.Output) and place == _Place() and self._level(node) == _NOTHING
        is_text = isinstance(node, nodes.Output) or any(map(self._may_be_text, (node, *node.find_all(nodes.Expr))))
        later = place.later or self._is_later(node, place.in_part)
        by_content = place.level == _CONTENT or bool(_names(node) & self._chosen)
        if is_text and by_content and later:
            self._found.add(place.in_answers)

    def _may_be_text(self, node: nodes.Node) -> bool:
        """Whether an expression is text that the template or a variable holds."""
        if isinstance(node, nodes.Name):
            return self._level(node) == _NOTHING
        return isinstance(node, nodes.Const) and isinstance(node.value, str)

    def _assign(self, target: nodes.Node, level: int, later: bool) -> None:
        names = _names(target)
        self._levels |= {name: max(level, self._levels.get(name, _NOTHING)) for name in names}
        self._later_names |= names if later else set()
        self._lasting |= names if isinstance(target, nodes.NSRef) else set()

    def _level(self, node: nodes.Node) -> int:
        """What an expression, or all of a statement, depends on."""
        if isinstance(node, nodes.Name):
            return self._levels.get(node.name, _NOTHING)
        level = max(map(self._truth if isinstance(node, _LOGIC) else self._level, node.iter_child_nodes()), default=0)
        if isinstance(node, nodes.Test) and node.name in _KIND_TESTS:
            return min(level, _ORDER)
        if isinstance(node, nodes.Filter) and node.name in ("length", "count") and isinstance(node.node, nodes.Name):
            return _ORDER if node.node.name == "messages" else level
        key = _key(node)
        if key in ("nextitem", "previtem"):
            return _CONTENT
        return min(level, _ORDER) if key in ("role", "type") else level

    def _truth(self, node: nodes.Node) -> int:
        """What the truth of an expression depends on; that a message calls functions is not yet what it says."""
        asks = isinstance(node, nodes.Compare) and isinstance(node.expr, nodes.Const) and node.expr.value
        return min(self._level(node), _ORDER) if "tool_calls" in (_key(node), asks) else self._level(node)

    def _is_part(self, node: nodes.Node) -> bool:
        """Whether an expression is no list of messages, but what one message holds, an argument, or the tools."""
        if isinstance(node, nodes.Filter) and node.name == "items" and node.node is not None:
            return self._is_part(node.node)
        return isinstance(_key(node), str) or _names(node) <= self._parameters | {"tools"}

    def _is_later(self, node: nodes.Node, in_part: bool) -> bool:
        """Whether an expression depends on messages that come after the one that is being written."""
        if isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Const) and node.arg.value == 0:
            return False
        if isinstance(node, nodes.Name):
            return node.name in self._later_names
        if isinstance(node, nodes.Getattr | nodes.Getitem) and "loop" in _names(node.node) and _key(node) in _LATER:
            return not in_part
        return any(self._is_later(child, in_part) for child in node.iter_child_nodes())


def _names(node: nodes.Node) -> set[str]:
    own = {node.name} if isinstance(node, nodes.Name | nodes.NSRef) else set()
    return own | {name.name for name in node.find_all(nodes.Name)}


def _raises(node: nodes.Node) -> bool:
    if isinstance(node, nodes.TemplateData):
        return not node.data.strip()
    return isinstance(node, nodes.Call) and "raise_exception" in _names(node.node)


def _key(node: nodes.Node) -> Any:
    if isinstance(node, nodes.Getattr):
        return node.attr
    return node.arg.value if isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Const) else None


def _count(node: nodes.Node, name: str) -> int:
    found = [node] if isinstance(node, nodes.Name) else node.find_all(nodes.Name)
    return len([found for found in found if found.name == name])


def _wants_answer(test: nodes.Node) -> bool:
    """Whether a test lets the assistant's messages through only."""
    if isinstance(test, nodes.And):
        return _wants_answer(test.left) or _wants_answer(test.right)
    if not isinstance(test, nodes.Compare) or len(test.ops) != 1 or _key(test.expr) != "role":
        return False
    operand = test.ops[0]
    return operand.op == "eq" and isinstance(operand.expr, nodes.Const) and operand.expr.value == "assistant"
