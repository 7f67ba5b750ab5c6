"""Rendering of a chat template within bounds of time and size.

A template comes with a model and is a stranger's code. transformers renders it in jinja's sandbox,
which keeps it from the machine, but not from running or growing without end. Here the same
environment also looks at the time in each loop pass, call, filter and test, and weighs values: the
operands before an operation that multiplies their sizes or compares them, and the result after any
other. So one operation stays small, and the time limits their number.
"""

from __future__ import annotations

import functools
import re
import time
from collections.abc import Callable, Iterable, Iterator, Set, ValuesView
from threading import Lock
from types import BuiltinMethodType
from typing import Any

from jinja2 import DictLoader, nodes
from jinja2.exceptions import TemplateError, TemplateNotFound, TemplateSyntaxError
from jinja2.runtime import Context, LoopContext
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer
from transformers.utils import chat_template_utils

from kdcore.errors import UserError
from kdcore.runs.today import today

SECONDS = 10.0
"""Processor time of one rendering; templates of real models take milliseconds."""
LARGEST = 2**25
"""Weight of any value of a template, its output included: a character is 1, an item `ITEM`."""
ITEM = 64
BITS = 2**16
"""Bits of an integer; Python refuses to print a fifth of them, and divides longer ones slowly."""
LONGEST = 2**18
"""Characters of a template; the longest ones of real models have a tenth."""
CLOCK = 100
_MESSAGE = 300
"""Characters of an error that a template makes itself."""

_MULTIPLY = frozenset(
    {"batch", "center", "expandtabs", "indent", "join", "ljust", "replace", "rjust", "slice", "sum"}
    | {"to_bytes", "tojson", "translate", "urlize", "wordwrap", "xmlattr", "zfill"}
)
"""Filters and methods whose result may be as large as the product of their arguments."""
_FORMAT = frozenset({"format", "format_map"})
_WIDTHS = re.compile(r"\d{5}|%[^a-zA-Z%]*\*|\{[^{}]*:[^{}]*\{")
"""In a format string: a width of many digits, or one that is taken from a value."""
_COUNTED, _WEIGHED = "counted loop", "weighed value"
"""Filters that no template can name, since their names hold a space."""

FIX = "name another template (template: FILE beside the model), or fix the one in its folder"
_renders_one_at_a_time = Lock()
_compiled_by_transformers: Any = chat_template_utils._compile_jinja_template


class _TooCostly(Exception):
    """A template that takes too long, or makes too large a value."""


def render(template: str, id: str, **arguments: Any) -> tuple[list[str], list[Any]]:
    """Render conversations by a chat template, as transformers does, within bounds.

    Args:
        template: The chat template.
        id: Name of the conversation in messages.
        **arguments: The other arguments of transformers' ``render_jinja_template``.

    Returns:
        The rendered texts, and the spans of their ``{% generation %}`` parts.

    Raises:
        UserError: The template is not valid, rejects the conversation, fails, or exceeds a bound.
    """
    if len(template) > LONGEST:
        raise UserError(f"the chat template has more than {LONGEST:,} characters", FIX)
    library: Any = chat_template_utils
    try:
        with _renders_one_at_a_time:
            library._compile_jinja_template = _started
            try:
                rendered: Any = library.render_jinja_template(chat_template=template, **arguments)
            finally:
                library._compile_jinja_template = _compiled_by_transformers
    except MemoryError:
        raise
    except Exception as fault:
        raise _explained(fault, id) from fault
    texts, marks = rendered
    return texts, marks


def _explained(fault: Exception, id: str) -> UserError:
    named = fault.name if isinstance(fault, TemplateNotFound) else fault
    said = " ".join(str(named).split())[:_MESSAGE]
    if isinstance(fault, TemplateNotFound):
        return UserError(f"{id}: the chat template includes the file '{said}'", FIX)
    if isinstance(fault, TemplateSyntaxError):
        return UserError(f"the chat template has an error in line {fault.lineno}: {said}", FIX)
    if type(fault) is TemplateError:  # of raise_exception
        return UserError(
            f"{id}: the chat template rejects the conversation: {said}",
            "name another template (template: FILE beside the model), or remove this conversation",
        )
    if isinstance(fault, _TooCostly):
        return UserError(f"{id}: the chat template {said}", FIX)
    if isinstance(fault, RecursionError):
        said = "it is nested too deeply, or its macros call each other without end"
    return UserError(f"{id}: the chat template fails: {type(fault).__name__}: {said}", FIX)


def _started(template: str) -> Any:
    compiled = _compiled(template)
    environment: Any = compiled.environment
    environment.begin()
    return compiled


@functools.lru_cache(maxsize=8)
def _compiled(template: str) -> Any:
    """Compile a template in an environment of transformers that has bounds."""
    # not from the cache: each template has its own environment, which tracks {% generation %} parts
    environment = _compiled_by_transformers.__wrapped__("").environment
    environment.__class__ = type("Bounded", (_Bounded, type(environment)), {})
    environment.bound()
    environment.globals["strftime_now"] = lambda shape: today().strftime(shape)
    environment.begin()
    compiled = environment.from_string(template)
    # with {% generation %} parts, transformers joins the output itself
    parts = compiled.root_render_func
    compiled.root_render_func = lambda context: environment.limited(parts(context))
    return compiled


class _Bounded(ImmutableSandboxedEnvironment):
    """The bounds; `bound` must be called once, and `begin` before each rendering."""

    intercepted_binops = frozenset(ImmutableSandboxedEnvironment.default_binop_table)
    _ends: float
    _cost: int

    def bound(self) -> None:
        """Watch the filters and tests, and give up what no chat template uses."""
        for known in (self.filters, self.tests):
            functions: dict[str, Any] = known
            functions |= {name: self._watched(name, each) for name, each in functions.items()}
        self.filters |= {_COUNTED: self._counted, _WEIGHED: self._weighed}
        self.globals.pop("lipsum", None)
        self.loader = DictLoader({})  # the error for another template then names it

    def begin(self) -> None:
        """Start the time of a rendering."""
        self._ends, self._cost = time.thread_time() + SECONDS, 0

    def concat(self, parts: Iterable[str]) -> str:
        """Join the output of a template, a macro or a block."""
        return "".join(self.limited(parts))

    def limited(self, parts: Iterable[str]) -> Iterator[str]:
        """Yield the parts of an output until they are too large together."""
        size = 0
        for part in parts:
            size += len(part)
            if size > LARGEST:
                self._too_large()
            self._count(len(part) // 1000)
            yield part

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        """See `SandboxedEnvironment.call`."""
        __self._count()
        if isinstance(__obj, LoopContext):  # `{{ loop(children) }}`
            args = tuple(map(__self._counted, args))
        method = getattr(__obj, "__wrapped__", __obj)  # jinja wraps str.format
        if isinstance(method, BuiltinMethodType):
            args = __self._foreseen(method.__name__, (method.__self__, *args), kwargs)[1:]
        return __self._weighed(super().call(__context, __obj, *args, **kwargs))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """See `SandboxedEnvironment.call_binop`."""
        for each in (left, right):
            if isinstance(each, int):  # one that the template writes, or a filter reads
                self._weighed(each)
        if operator == "%" and isinstance(left, str | bytes):
            self._foreseen("format", (left, right), {})
        integers = isinstance(left, int) and isinstance(right, int)
        if operator == "*":
            sizes = [_weight(x) if integers else _factor(x) for x in (left, right)]
            if sizes[0] * sizes[1] > LARGEST:
                self._too_large()
        if operator == "**" and integers and left.bit_length() * right > BITS:
            self._too_large()
        return self._weighed(super().call_binop(context, operator, left, right))

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree: nodes.Template = _Watches().visit(super()._parse(source, name, filename))
        return tree

    def _watched(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def watched(*args: Any, **kwargs: Any) -> Any:
            self._count()
            return self._weighed(function(*self._foreseen(name, args, kwargs), **kwargs))

        return watched

    def _foreseen(self, name: str, args: tuple[Any, ...], named: dict[str, Any]) -> tuple[Any, ...]:
        """Return the arguments, unless what they multiply to is too large."""
        if name not in _MULTIPLY | _FORMAT:
            return args
        # an iterator can be weighed once only
        args = tuple(list(each) if isinstance(each, Iterator | range) else each for each in args)
        told = [each for each in args if not isinstance(each, ImmutableSandboxedEnvironment)]
        subject, *others = [each for each in told if type(each).__module__ != "jinja2.nodes"]
        others += named.values()
        if name == "sum" and any(isinstance(each, list) for each in others):
            raise _TooCostly("adds lists by the filter sum")  # which copies them again and again
        size = _factor(subject)
        if name in _FORMAT:
            text = subject if isinstance(subject, str) else bytes(subject).decode("latin-1")
            if _WIDTHS.search(text):
                raise _TooCostly("formats a value with a width that is too large or not written")
            size, others = text.count("%") + text.count("{"), [str(each) for each in others]
        if max(1, size) * max(1, sum(map(_factor, others))) > LARGEST:
            self._too_large()
        return args

    def _counted(self, values: Any) -> Any:
        """Iterate, and look at the time in each pass."""
        if not isinstance(values, Iterable):
            return values  # the loop says so itself
        return self._passes(values)

    def _passes(self, values: Iterable[Any]) -> Iterator[Any]:
        for value in values:
            self._count()
            yield value

    def _count(self, cost: int = 1) -> None:
        """Look at the time, which is slow, after operations of a `CLOCK` in all."""
        self._cost += cost
        if self._cost >= CLOCK:
            self._cost = 0
            if time.thread_time() > self._ends:
                raise _TooCostly(f"takes more than {SECONDS:g} s for a conversation")

    def _weighed(self, value: Any) -> Any:
        weight = _weight(value)
        if weight > LARGEST:
            self._too_large()
        self._count(1 + weight // 1000)
        return value

    def _too_large(self) -> None:
        raise _TooCostly(f"makes a value of more than {LARGEST:,} characters, or a huge integer")


class _Watches(NodeTransformer):
    """Puts the filters of `_Bounded.bound` around loops, and around what can double a value."""

    def visit_For(self, node: nodes.For) -> nodes.For:
        self.generic_visit(node)
        node.iter = _filtered(node.iter, _COUNTED)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Expr:
        self.generic_visit(node)
        return _filtered(node, _WEIGHED)

    visit_List = visit_Dict = visit_Concat  # a list that holds another twice, and so on

    def visit_Compare(self, node: nodes.Compare) -> nodes.Compare:
        self.generic_visit(node)
        node.expr = _filtered(node.expr, _WEIGHED)
        for each in node.ops:
            each.expr = _filtered(each.expr, _WEIGHED)
        return node

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Expr:
        self.generic_visit(node)
        return _filtered(node, _WEIGHED) if isinstance(node.arg, nodes.Slice) else node

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Expr:
        self.generic_visit(node)
        return node if node.ctx == "store" else _filtered(node, _WEIGHED)


def _filtered(node: Any, name: str) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


def _factor(value: Any) -> int:
    """How often an operation with this argument may repeat the other one."""
    if isinstance(value, int):
        return abs(value)
    return len(value) if isinstance(value, str | bytes) else _weight(value)


def _weight(value: Any) -> int:
    """Weight of a value, with all that is inside it; counting ends above `LARGEST`."""
    total, rest = 0, [value]
    while rest and total <= LARGEST:
        each = rest.pop()
        total += ITEM
        if isinstance(each, str | bytes):
            total += len(each)
        elif isinstance(each, int):
            total += LARGEST * (each.bit_length() > BITS)
        elif isinstance(each, dict):
            rest += [*each.keys(), *each.values()]
        elif isinstance(each, list | tuple | Set | ValuesView):
            rest += each
        elif isinstance(each, Namespace):
            rest.append(getattr(each, "_Namespace__attrs"))  # noqa: B009 (private to jinja)
    return total
