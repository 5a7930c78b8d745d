"""A pickle read as data: nothing that it names is imported, called or written to.

Terms:
    global: what a pickle imports by name (``torch._utils._rebuild_tensor_v2``, ``os.system``).
        Here it is its dotted name and nothing else.
    constructor: a function of this package that makes the value which a global from the allow-list
        would make, after checking the arguments.
    object: what any other global makes here: an inert record of its dotted name, its arguments
        and its state, from which tensors and settings can be read.

A pickle is a program for a small machine with a stack. :class:`Unpickler` runs that machine, but
every instruction that would import, call, or set an attribute of something has been replaced. What
a pickle can make it do is bounded by the pickle's own size.
"""

import pickle
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NoReturn

#: An instruction of one byte can take a hundred bytes of memory; this bounds them to 0.5 GB.
_MOST_INSTRUCTIONS = 5_000_000

#: Values in a tuple that is the key of a dictionary: nested tuples repeat one without limit.
_LARGEST_KEY = 1000

Constructor = Callable[..., object]


class UnpicklingRefused(Exception):
    """What a pickle asks for is not done; the text says why."""


class Global:
    """The name of something that a pickle imports."""

    __slots__ = ("name",)

    def __init__(self, name: str) -> None:
        self.name = name

    def __repr__(self) -> str:
        return f"<{self.name}>"


class Object:
    """An inert record of an object of a class that was not imported.

    Attributes:
        name: the dotted name of its class, or of the function that would have made it.
        args: the arguments, positional ones first; the values of named arguments follow.
        state: its attributes by name.
        entries: its entries, if the class is a dictionary's.
        items: its items, if the class is a list's or a set's.
        flaw: why the value could not be made, if ``name`` is one that is usually made; else empty.
    """

    __slots__ = ("args", "entries", "flaw", "items", "name", "state")

    def __init__(self, name: str, args: tuple[object, ...] = (), flaw: str = "") -> None:
        self.name = name
        self.args = args
        self.flaw = flaw
        self.state: dict[Any, object] = {}
        self.entries: dict[Any, object] = {}
        self.items: list[object] = []

    def __repr__(self) -> str:
        return f"<object of {self.name}>"

    def build(self, state: object) -> None:
        """Take over a state: attributes, or attributes and those in slots, or anything else."""
        parts = state if isinstance(state, tuple) and len(state) == 2 else (state,)
        attributes = [part for part in parts if isinstance(part, dict)]
        if len(attributes) == sum(part is not None for part in parts):
            for part in attributes:
                self.state.update(part)
        else:
            self.state["__state__"] = state


class Memory:
    """Bytes with a position, read like a file; a read beyond their end is an error.

    Args:
        view: the bytes, which are not copied.
        start: the position to begin at.
    """

    def __init__(self, view: memoryview, start: int = 0) -> None:
        self.view = view
        self.position = start

    def read(self, size: int) -> bytes:
        """The next ``size`` bytes.

        Raises:
            EOFError: there are fewer.
        """
        end = self.position + size
        if size < 0 or end > len(self.view):
            raise EOFError("it ends too early")
        part = bytes(self.view[self.position : end])
        self.position = end
        return part

    def readline(self) -> bytes:
        """The bytes up to and including the next newline.

        Raises:
            EOFError: there is no newline in the next 64 KiB.
        """
        part = bytes(self.view[self.position : self.position + 65536])
        end = part.find(b"\n") + 1
        if end == 0:
            raise EOFError("it ends within a line, or the line is too long")
        self.position += end
        return part[:end]


# ---- values of the standard library --------------------------------------------------------------


def _sized(value: object) -> Any:
    """A container whose length is what it takes in memory, unlike a range's."""
    if not isinstance(value, (dict, list, tuple, set, frozenset)):
        raise UnpicklingRefused(f"a container is made from a {type(value).__name__}")
    return value


def _mapping(*args: object) -> dict[Any, object]:
    """What OrderedDict, Counter and dict make of pairs or of a dictionary."""
    made: OrderedDict[Any, object] = OrderedDict()
    if args:
        given = _sized(args[0])
        for key, value in given.items() if isinstance(given, dict) else given:
            made[_checked_key(key)] = value
    return made


def _default_mapping(*args: object) -> dict[Any, object]:
    return _mapping(*args[1:])  # the first is the factory


def _set(items: object = ()) -> set[object]:
    return {_checked_key(item) for item in _sized(items)}


def _encode(text: object, encoding: object = "latin1") -> bytes:
    """``_codecs.encode``, by which pickles of protocol 2 store bytes."""
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1", "utf-8", "utf8"):
        raise UnpicklingRefused("text in an unusual encoding")
    return text.encode(str(encoding))


def _bytes(value: object = b"") -> bytes:
    if not isinstance(value, (bytes, bytearray)):  # a number would be a length
        raise UnpicklingRefused(f"bytes are made from a {type(value).__name__}")
    return bytes(value)


def _complex(real: object = 0, imaginary: object = 0) -> complex:
    if not isinstance(real, (int, float)) or not isinstance(imaginary, (int, float)):
        raise UnpicklingRefused("a complex number is not made from numbers")
    return complex(real, imaginary)


def _instance(of: object = None, *args: object) -> Object:
    """What ``copyreg`` makes of a class that the C pickler does not make itself."""
    if not isinstance(of, Global):
        raise UnpicklingRefused("an object is made without its class")
    return Object(of.name, args)


def _builtins() -> dict[str, Constructor]:
    made: dict[str, Constructor] = {
        "dict": _mapping,
        "list": lambda items=(): list(_sized(items)),
        "tuple": lambda items=(): tuple(_sized(items)),
        "set": _set,
        "frozenset": lambda items=(): frozenset(_set(items)),
        "bytes": _bytes,
        "bytearray": lambda value=b"", *_: _bytes(
            value.encode("latin1") if isinstance(value, str) else value
        ),
        "complex": _complex,
    }
    return {f"{module}.{name}": make for module in ("builtins", "__builtin__")
            for name, make in made.items()}  # fmt: skip


#: The constructors of plain containers.
STANDARD: Mapping[str, Constructor] = {
    "collections.OrderedDict": _mapping,
    "collections.Counter": _mapping,
    "collections.defaultdict": _default_mapping,
    "_codecs.encode": _encode,
    **{
        f"{module}.{name}": _instance
        for module in ("copyreg", "copy_reg")
        for name in ("_reconstructor", "__newobj__", "__newobj_ex__")
    },
    **_builtins(),
}


def _checked_key(key: object) -> Any:
    """A key, if it can be hashed in a time that its own size bounds.

    Raises:
        UnpicklingRefused: it cannot.
    """
    if isinstance(key, (str, int, float, bytes, Global, Object)) or key is None:
        return key
    left, level = _LARGEST_KEY, [key]
    while level:  # level by level, as the depth has to be bounded too
        left -= len(level)
        if left < 0:
            raise UnpicklingRefused("the key of a dictionary is too large")
        level = [x for value in level if isinstance(value, (tuple, frozenset)) for x in value]
    return key


# ---- the machine ---------------------------------------------------------------------------------


class Unpickler(pickle._Unpickler):
    """The machine that runs a pickle without doing what it asks for.

    Args:
        memory: the bytes; the position after :meth:`load` is behind the pickle.
        constructors: what makes the values of the globals on the allow-list, by dotted name.
        persistent: makes the value of a persistent id, by which torch refers to storages; None
            refuses such ids.

    Raises (by :meth:`load`):
        UnpicklingRefused: the pickle asks for more than it may.
        Exception: damaged bytes lead to any error (IndexError, struct.error, MemoryError, …).
    """

    dispatch: ClassVar[dict[int, Callable[[Any], None]]] = dict(pickle._Unpickler.dispatch)
    pop_mark: Callable[[], list[Any]]  # of the base class, where typeshed leaves it out

    def __init__(
        self,
        memory: Memory,
        constructors: Mapping[str, Constructor] = STANDARD,
        persistent: Callable[[Any], object] | None = None,
    ) -> None:
        # latin1 takes any byte: Python 2 stored arrays as text
        super().__init__(memory, fix_imports=False, encoding="latin1")
        self.memory = memory
        self.constructors = constructors
        self.persistent = persistent
        self.left = 2 * len(memory.view) + 4096
        self.globals: dict[str, Global] = {}

    def load(self) -> object:
        """Run the pickle up to its end, and return the value that it leaves."""
        self.read, self.readline = self.memory.read, self.memory.readline
        self.metastack: list[list[object]] = []
        self.stack: list[Any] = []
        self.append = self.stack.append
        self.proto = 0
        dispatch, memory = self.dispatch, self.memory
        for _ in range(_MOST_INSTRUCTIONS):
            if memory.position >= len(memory.view):
                raise EOFError("it ends too early")
            code = memory.view[memory.position]
            memory.position += 1
            if code == pickle.STOP[0]:
                return self.stack.pop()
            if code not in dispatch:
                raise UnpicklingRefused(f"{code:#04x} is not an instruction of a pickle")
            dispatch[code](self)
        raise UnpicklingRefused("it is a pickle of more than five million instructions")

    def find_class(self, module: str, name: str) -> Global:
        """The name alone; ``numpy._core`` is ``numpy.core`` since NumPy 2."""
        dotted = f"{module}.{name}".replace("numpy._core.", "numpy.core.", 1)
        return self.globals.setdefault(dotted, Global(dotted))

    def persistent_load(self, pid: Any) -> object:
        """What ``persistent`` makes of a persistent id; without it, the id is refused."""
        if self.persistent is None:
            raise UnpicklingRefused("it refers to data outside itself")
        return self.persistent(pid)

    def make(self, what: object, args: object) -> object:
        """What calling ``what`` makes here."""
        given = args if isinstance(args, tuple) else (args,)
        if not isinstance(what, Global):
            return Object(repr(what)[:80] if isinstance(what, Object) else "", given)
        constructor = self.constructors.get(what.name)
        if constructor is None:
            return Object(what.name, given)
        try:
            made = constructor(*given)
        except (UnpicklingRefused, TypeError, ValueError) as error:
            return Object(what.name, given, flaw=str(error) or type(error).__name__)
        self._spend(made)
        return made

    def _spend(self, *copied: object) -> None:
        """Count the values that were copied: one in a pickle can be referred to without limit.

        Raises:
            UnpicklingRefused: they are more than the pickle could contain.
        """
        for value in copied:
            if isinstance(value, (str, bytes, tuple, list, dict, set, frozenset)):
                self.left -= len(value)
        if self.left < 0:
            raise UnpicklingRefused("it copies its own values more often than any program does")

    def load_reduce(self) -> None:
        args = self.stack.pop()
        self.stack[-1] = self.make(self.stack[-1], args)

    def load_newobj(self) -> None:
        args, what = self.stack.pop(), self.stack.pop()
        self.append(self.make(what, args))

    def load_newobj_ex(self) -> None:
        named, args, what = self.stack.pop(), self.stack.pop(), self.stack.pop()
        if isinstance(named, dict) and isinstance(args, tuple):
            self._spend(args, named)
            args = (*args, *named.values())
        self.append(self.make(what, args))

    def _instantiate(self, what: object, args: list[object]) -> None:
        self.append(self.make(what, tuple(args)))

    def get_extension(self, code: int) -> NoReturn:
        raise UnpicklingRefused(f"it uses the extension {code} of the program that wrote it")

    def load_frame(self) -> None:
        self.read(8)  # its length, which helps those who read from a slow file

    def load_next_buffer(self) -> None:
        raise UnpicklingRefused("it refers to data outside itself")

    def load_readonly_buffer(self) -> None:
        pass  # every value here is a copy

    def load_bytearray8(self) -> None:
        length = int.from_bytes(self.read(8), "little")
        self.append(self.read(length))

    def load_build(self) -> None:
        state, value = self.stack.pop(), self.stack[-1]
        if isinstance(value, Object):
            self._spend(*(state if isinstance(state, tuple) else (state,)))
            value.build(state)
        elif type(value) is OrderedDict and isinstance(state, dict):
            versions = state.get("_metadata")  # beside the tensors, by torch
            if isinstance(versions, Mapping):
                vars(value)["_metadata"] = versions
        # tensors and numbers keep the value that they have been made with

    def load_append(self) -> None:
        self._extend([self.stack.pop()])

    def load_appends(self) -> None:
        self._extend(self.pop_mark())

    def _extend(self, items: list[object]) -> None:
        value = self.stack[-1]
        if type(value) is list:
            value.extend(items)
        elif isinstance(value, Object):
            value.items.extend(items)
        else:
            raise UnpicklingRefused(f"items are appended to a {type(value).__name__}")

    def load_additems(self) -> None:
        items, value = self.pop_mark(), self.stack[-1]
        if type(value) is set:
            value.update(_checked_key(item) for item in items)
        else:
            self._extend(items)

    def load_frozenset(self) -> None:
        items = self.pop_mark()
        self.append(frozenset(_checked_key(item) for item in items))

    def load_setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._update(self.stack[-1], [key, value])

    def load_setitems(self) -> None:
        items = self.pop_mark()
        self._update(self.stack[-1], items)

    def load_dict(self) -> None:
        items, made = self.pop_mark(), dict[Any, object]()
        self._update(made, items)
        self.append(made)

    def _update(self, target: object, items: list[Any]) -> None:
        """Set entries, given as keys and values in turn."""
        if isinstance(target, Object):
            entries = target.entries
        elif type(target) in (dict, OrderedDict):
            entries = target  # type: ignore[assignment]  # the line above has narrowed it
        else:
            raise UnpicklingRefused(f"entries are set in a {type(target).__name__}")
        for key, value in zip(items[::2], items[1::2], strict=True):
            entries[_checked_key(key)] = value


Unpickler.dispatch |= {
    pickle.REDUCE[0]: Unpickler.load_reduce,
    pickle.NEWOBJ[0]: Unpickler.load_newobj,
    pickle.NEWOBJ_EX[0]: Unpickler.load_newobj_ex,
    pickle.FRAME[0]: Unpickler.load_frame,
    pickle.NEXT_BUFFER[0]: Unpickler.load_next_buffer,
    pickle.READONLY_BUFFER[0]: Unpickler.load_readonly_buffer,
    pickle.BYTEARRAY8[0]: Unpickler.load_bytearray8,
    pickle.BUILD[0]: Unpickler.load_build,
    pickle.APPEND[0]: Unpickler.load_append,
    pickle.APPENDS[0]: Unpickler.load_appends,
    pickle.ADDITEMS[0]: Unpickler.load_additems,
    pickle.FROZENSET[0]: Unpickler.load_frozenset,
    pickle.SETITEM[0]: Unpickler.load_setitem,
    pickle.SETITEMS[0]: Unpickler.load_setitems,
    pickle.DICT[0]: Unpickler.load_dict,
}
